// Asks for a key, which stays in this tab's sessionStorage: in no cookie, in no address.
import { isSendable, key } from "./api.js";
import { setText } from "./format.js";

export class KeyDialog {
  constructor() {
    this.dialog = document.getElementById("key-dialog");
    this.input = document.getElementById("key");
    this.reason = document.getElementById("key-reason");
    this.usual = this.reason.textContent;
    this.waiting = [];
    this.listeners = [];
    document.getElementById("key-form").addEventListener("submit", (event) => {
      const value = this.input.value.trim();
      if (isSendable(value)) return this.#use(value);
      event.preventDefault();
      this.#say("A key has letters, digits and signs of ASCII, and no space.", true);
    });
    document.getElementById("key-forget").addEventListener("click", () => {
      this.dialog.close();
      this.#use("");
    });
  }

  // Opens the dialog; `refusal` is what the gateway said of the key before, if anything.
  ask(refusal) {
    this.#say(refusal ? `The gateway refused this key: ${refusal}` : this.usual, Boolean(refusal));
    this.input.value = "";
    if (!this.dialog.open) this.dialog.showModal();
    this.input.focus();
  }

  #say(text, isRefusal) {
    setText(this.reason, text);
    this.reason.dataset.refused = isRefusal ? "yes" : "";
  }

  onChange(listener) {
    this.listeners.push(listener);
  }

  // Resolves once another key is used.
  changed() {
    return new Promise((resolve) => this.waiting.push(resolve));
  }

  #use(value) {
    key.set(value);
    for (const resolve of this.waiting.splice(0)) resolve();
    for (const listener of this.listeners) listener();
  }
}
