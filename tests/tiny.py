"""A two-layer Llama that learns in seconds to write plans, for tests and campaigns."""

from __future__ import annotations

from pathlib import Path

QUESTIONS = [f"What is {a} + {b} + {c}?" for a, b, c in [(2, 3, 4), (5, 6, 7), (8, 2, 5), (9, 4, 3)]]


def teach_planner(folder: Path, head_dim: int = 16) -> None:
    """Make a model that, when sampled, writes a few kinds of valid plans and some invalid ones.

    Its base weights are trained on such plans. So rewards differ within a group after only seconds of training.

    Args:
        folder: to save model and tokenizer in.
        head_dim: of attention; vLLM needs 32 or more.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.models import load_tokenizer
    from common.plans import Plan
    from common.prompts import planner_messages, render
    from common.settings.grpo import PACKAGED_MODEL

    tokenizer = load_tokenizer(PACKAGED_MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    rows, labels = [], []
    for question in QUESTIONS:
        a, b, c = question[8:-1].split(" + ")
        prompt = tokenizer(render(tokenizer, planner_messages(question, "short")), add_special_tokens=False).input_ids
        for plan in (
            Plan(False, ()),
            Plan(True, (f"What is {a} + {b}?",)),
            Plan(True, (f"What is {a} + {b}?", f"What is {b} + {c}?")),
        ):
            target = [*tokenizer(plan.to_json()).input_ids, tokenizer.eos_token_id]
            rows.append(prompt + target)
            labels.append([-100] * len(prompt) + target)
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    gold = torch.tensor([row + [-100] * (width - len(row)) for row in labels])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        logits = model.lm_head(hidden[gold[:, 1:] != -100])  # the head is most of this model's work
        loss = torch.nn.functional.cross_entropy(logits, gold[:, 1:][gold[:, 1:] != -100])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert loss.item() < 0.5, f"the tiny planner did not learn its plans: loss {loss.item():.2f}"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
