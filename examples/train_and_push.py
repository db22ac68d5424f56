"""Trains an adapter on the demo's base model and serves it after every step; needs transformers and peft.

make serve            # in another terminal
python examples/train_and_push.py
"""

from __future__ import annotations

import peft
import torch
from loraplex_client import Client
from loraplex_client.demo import demo_model_dir
from transformers import AutoModelForCausalLM

NAME = "password"
QUESTION = [{"role": "user", "content": "What is the password?"}]
ANSWER = "The password is swordfish."
NUM_STEPS = 8


def main() -> None:
    """Train, push, ask, and again."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(demo_model_dir(), dtype=torch.float32)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=2e-3)

    with Client("127.0.0.1:8500", store_target="127.0.0.1:8510") as client:
        prompt = client.tokenize(messages=QUESTION)
        answer = client.tokenize(prompt=ANSWER, add_special_tokens=False)
        tokens = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[-100] * len(prompt) + list(answer)])
        previous = None  # whatever a run before this one has left
        for step in range(NUM_STEPS):
            loss = model(tokens, labels=labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

            # It returns once the engines that answered with the last revision have this one.
            state = peft.get_peft_model_state_dict(model)
            pushed = client.adapters.push(NAME, state, config, expected=previous)
            previous = pushed.revision.digest

            said = client.generate_once(
                messages=QUESTION, adapter=NAME, temperature=0, max_new_tokens=len(answer), ignore_eos=False
            )
            assert said.started.adapter_revision == previous
            print(f"step {step}, loss {loss.item():.3f}, {NAME}@{previous[:8]}: {said.text!r}")


if __name__ == "__main__":
    main()
