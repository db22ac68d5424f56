// Asks for a key, which stays in this tab's sessionStorage: in no cookie, in no address.
import { key } from "./api.js";
import { setText } from "./format.js";

export class KeyDialog {
  constructor() {
    this.dialog = document.getElementById("key-dialog");
    this.input = document.getElementById("key");
    this.reason = document.getElementById("key-reason");
    this.usual = this.reason.textContent;
    this.waiting = [];
    this.listeners = [];
    document.getElementById("key-form").addEventListener("submit", () => this.#use(this.input.value.trim()));
    document.getElementById("key-forget").addEventListener("click", () => {
      this.dialog.close();
      this.#use("");
    });
  }

  // Opens the dialog; `refusal` is what the gateway said of the key before, if anything.
  ask(refusal) {
    setText(this.reason, refusal ? `The gateway refused this key: ${refusal}` : this.usual);
    this.reason.dataset.refused = refusal ? "yes" : "";
    this.input.value = "";
    if (!this.dialog.open) this.dialog.showModal();
    this.input.focus();
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
