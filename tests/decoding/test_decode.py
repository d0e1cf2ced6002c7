"""Decoding on a CPU gives the same tokens as plain `generate`, with sharing, drafts and packed weights."""

from __future__ import annotations

import pytest
import torch
from conftest import QUESTIONS
from transformers import TopPLogitsWarper

from common import prompts
from common.decoding.blocks import Kept
from common.decoding.decode import _sample, decode
from common.decoding.drafts import Drafts
from common.decoding.packing import packed_linears, packing_kept
from common.decoding.sharing import PIECE_TOKENS, block_ends, shared_heads, shared_prefix_length
from common.models import load_base
from common.workers.local import FrozenWorker, end_token_ids

SUMS = ["What is 7 + 8 + 5?", "What is 3 + 9?", "What is 21 + 30 + 4?", "What is 2 + 2 + 2 + 2?", "What is 6 + 9 + 1?"]


def plain_generate(model, tokenizer, texts: list[str], max_new_tokens: int) -> list[list[int]]:
    """The reference: one unpadded `generate` call per prompt."""
    outputs = []
    for text in texts:
        batch = tokenizer([text], return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        outputs.append(ids[0, batch.input_ids.shape[1] :].tolist())
    return outputs


@pytest.mark.parametrize("branched", [True, False], ids=["CPU", "as on a GPU"])
def test_batched_decoding_equals_one_plain_generate_call_per_prompt(smollm2, monkeypatch, branched):
    model, tokenizer = smollm2
    monkeypatch.setattr("common.decoding.decode.can_branch", lambda model: branched)
    requests = [prompts.direct_messages(question, "few-shot") for question in SUMS]
    requests += [prompts.direct_messages("Say hello.", "instruct")]  # shares little with the others
    texts = [prompts.render(tokenizer, request) for request in requests]
    expected = plain_generate(model, tokenizer, texts, 24)
    eos = end_token_ids(model, tokenizer)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    options = {"max_new_tokens": 24, "eos_ids": eos, "pad_id": tokenizer.pad_token_id}
    for chosen in (range(len(texts)), range(len(SUMS)), [2]):  # mixed, long shared prefix, single
        assert decode(model, [ids[i] for i in chosen], **options) == [expected[i] for i in chosen]
    order, kinds = [5, 0, 1, 5, 2], ["other", "sum", "sum", "other", "sum"]
    assert decode(model, [ids[i] for i in order], kinds=kinds, **options) == [expected[i] for i in order]


def test_long_and_short_prompts_together_decode_like_each_alone(smollm2):
    model, tokenizer = smollm2
    story = " ".join(f"Then {name} buys {count} pens." for count in range(2, 40) for name in ("Ada", "Ben"))
    questions = [*SUMS, f"{story} How many pens does Ben buy first?", f"{story} Who buys pens?"]
    texts = [prompts.render(tokenizer, prompts.direct_messages(question)) for question in questions]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    lengths = [len(row) - shared_prefix_length(ids) for row in ids]
    assert lengths[-1] > 2 * PIECE_TOKENS and block_ends(lengths) == [5, 7]  # read in pieces, padded apart
    eos = end_token_ids(model, tokenizer)
    found = decode(model, ids, max_new_tokens=24, eos_ids=eos, pad_id=tokenizer.pad_token_id)
    assert found == plain_generate(model, tokenizer, texts, 24)
    assert len({len(row) for row in found}) > 1, "rows must leave the batch at different times"


def passes_of(model, run) -> list[int]:
    """Number of tokens in each forward pass of the model during `run`."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


@pytest.mark.parametrize("apart", [0, 10**9], ids=["kept apart", "copied"])
def test_what_some_prompts_share_is_read_once_and_changes_no_answer(smollm2, monkeypatch, apart):
    """Two questions with different numbers and lengths of subproblems, and an unrelated one; rows finish one by one."""
    model, tokenizer = smollm2
    monkeypatch.setattr("common.decoding.branching.MIN_KEPT_APART", apart)
    stories = ["Ada has 3 boxes of 12 pens and gives 5 pens to Ben. How many are left?", "A train runs 60 km an hour."]
    parts = [
        "What is 3 * 12?",
        "How many pens are in all the boxes together?",
        "What is 36 - 5?",
        "How far in 2 hours?",
    ]
    requests = [prompts.subproblem_messages(part, stories[0]) for part in parts[:3]]
    requests += [prompts.subproblem_messages(part, stories[1]) for part in parts[2:]]
    requests += [[{"role": "user", "content": "Say hello."}]]
    texts = [prompts.render(tokenizer, request) for request in requests]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    eos = end_token_ids(model, tokenizer)
    expected = plain_generate(model, tokenizer, texts, 20)
    found = decode(model, ids, max_new_tokens=20, eos_ids=eos, pad_id=tokenizer.pad_token_id)
    assert found == expected
    assert len(set(map(len, found))) > 1, "rows must leave at different times"


def test_guessed_tokens_save_passes_and_change_no_answer(smollm2):
    model, tokenizer = smollm2
    asked = ["Write the word apple twenty times.", "Repeat this three times: the quick brown fox jumps.", "Say hello."]
    texts = [prompts.render(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    expected = plain_generate(model, tokenizer, texts, 48)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    found = []
    options = {"max_new_tokens": 48, "eos_ids": end_token_ids(model, tokenizer), "pad_id": tokenizer.pad_token_id}
    passes = passes_of(model, lambda: found.extend(decode(model, ids, **options)))
    assert found == expected
    assert len(passes) < max(map(len, expected)) * 3 / 4, "every pass gave no more than a token a row"
    # an end token in the draft ends the answer there: the same prompt again, whose tokens are all known now
    assert decode(model, [*ids, *ids], **options) == [*expected, *expected]


def test_guessed_tokens_save_passes_and_change_no_sample(smollm2, monkeypatch):
    model, tokenizer = smollm2
    asked = ["Write the word apple twenty times.", "Repeat this three times: the quick brown fox jumps.", "Say hello."]
    texts = [prompts.render(tokenizer, [{"role": "user", "content": text}]) for text in asked]
    ids = tokenizer(texts, add_special_tokens=False).input_ids

    def found() -> tuple[list[list[int]], list[list[float]], int]:
        outputs, log_probs = [], []
        passes = passes_of(
            model,
            lambda: outputs.extend(
                decode(
                    model, ids, max_new_tokens=48, eos_ids=end_token_ids(model, tokenizer),
                    pad_id=tokenizer.pad_token_id, temperature=0.2, generator=torch.Generator().manual_seed(4),
                    log_probs=log_probs,
                )
            ),
        )  # fmt: skip
        return outputs, log_probs, len(passes)

    with_guesses, odds, fewer = found()
    monkeypatch.setattr("common.decoding.drafts.PASS_TOKENS", 0)
    without, expected, passes = found()
    assert with_guesses == without and fewer < passes * 0.9
    for mine, theirs in zip(odds, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sharpness", [0.05, 3.0])  # a nucleus of hundreds of tokens, and one of a few
def test_nucleus_sampling_draws_as_often_as_transformers_says_and_nothing_else(sharpness):
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(0)) * sharpness
    warped = TopPLogitsWarper(0.8)(None, logits / 0.7)
    numbers = (torch.arange(20_000) + 0.5) / 20_000
    drawn = _sample(logits.expand(len(numbers), -1), 0.7, 0.8, numbers)
    shares = torch.bincount(drawn, minlength=1000) / len(numbers)
    torch.testing.assert_close(shares, warped.softmax(dim=-1)[0], atol=2e-4, rtol=0)
    assert warped.softmax(dim=-1)[0][_sample(logits, 0.7, 0.8, torch.tensor([1 - 2**-24]))] > 0


def test_guesses_follow_what_came_before_and_stop_where_they_are_wrong():
    rows = Drafts([[1, 2, 3, 9, 1, 2, 3], [7, 8, 7, 8], [5, 1, 2], [40, 41]])
    assert rows.guess([0, 1, 2, 3], [5] * 4) == [[9, 1], [7, 8], [3], []]  # own text, a loop, another's
    assert rows.guess([0, 1], [1, 0]) == [[9], []]  # never longer than the limit
    assert rows.guess([1], [5]) == [[7, 8, 7]]
    many = Drafts([[1, 2, 1]] * 2 + [[50 + row] for row in range(6)])
    for new in range(100, 104):
        assert many.guess([0], [1]) != [[]]  # with one row a draft costs nothing, so even an unlikely one is tried
        many.add(0, [new, 1])  # a different token every time
        many.guess([1], [5])
        many.add(1, [2, 1])  # the same token every time
    assert many.guess(range(8), [5] * 8) == [[], [2, 1, 2], *[[]] * 6]
    full = Drafts([[1, 2, 1, 2]] * 16)
    assert full.guess(range(16), [5] * 16) == [[]] * 16
    few = full.guess(range(14), [5] * 14)
    assert sum(map(len, few)) <= 2  # up to 16 tokens in a pass


def test_what_prompts_of_a_kind_begin_with_is_read_once_for_all_calls(smollm2):
    model, tokenizer = smollm2
    worker = FrozenWorker(model, tokenizer, style="few-shot", max_tokens=12)
    waves = [
        [prompts.direct_messages(SUMS[0], "few-shot"), prompts.subproblem_messages("What is 3 + 9?", "", "few-shot")],
        [prompts.direct_messages(q, "few-shot") for q in SUMS[1:3]],
        [prompts.direct_messages(SUMS[3], "few-shot"), prompts.direct_messages("Say hello.", "few-shot")],
        [prompts.direct_messages(SUMS[4], "few-shot")],
    ]
    answers, read = [], []
    for wave in waves:
        passes = passes_of(model, lambda wave=wave: answers.extend(worker.generate(wave)))
        read.append(sum(passes))
    fresh = [
        answer
        for wave in waves
        for answer in FrozenWorker(model, tokenizer, style="few-shot", max_tokens=12, cache_size=0).generate(wave)
    ]
    assert answers == fresh
    turns = len(tokenizer(prompts.render(tokenizer, waves[3][0]), add_special_tokens=False).input_ids)
    assert read[1] > turns > 2 * max(read[2:]), read  # the third and fourth wave read questions and answers only


def test_rows_are_padded_apart_where_that_saves_enough():
    assert block_ends([5]) == [1]
    assert block_ends([300] * 8) == [8]
    assert block_ends([30] * 3 + [300]) == [4]  # saves 810 tokens of padding: less than another block costs
    assert block_ends([30] * 4 + [300] + [2000] * 2) == [4, 5, 7]
    assert block_ends([2000, 30, 30, 30]) == [1, 4]  # rows stay in their order


def test_what_memory_held_before_reaches_no_answer(smollm2):
    model, tokenizer = smollm2
    sums = [f"What is {a} + {a + 1}?" for a in range(3)]
    requests = [prompts.subproblem_messages(part, question) for question in SUMS[:2] for part in sums]
    requests += [prompts.combine_messages(SUMS[2], sums, ["1", "3", "5"]), prompts.direct_messages(SUMS[3])]
    texts = [prompts.render(tokenizer, request) for request in requests]
    expected = plain_generate(model, tokenizer, texts, 6)
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    eos = end_token_ids(model, tokenizer)
    torch.use_deterministic_algorithms(True)  # makes every uninitialised tensor NaN
    try:
        assert torch.empty(3).isnan().all()
        assert decode(model, ids, max_new_tokens=6, eos_ids=eos, pad_id=tokenizer.pad_token_id) == expected
    finally:
        torch.use_deterministic_algorithms(False)


def test_shared_prefix_leaves_a_token_to_every_prompt():
    assert shared_prefix_length([[1, 2, 3], [1, 2, 4]]) == 2
    assert shared_prefix_length([[1, 2], [1, 2, 3]]) == 1
    assert shared_prefix_length([[5], [5]]) == 0
    assert shared_prefix_length([[1, 2, 3]] * 2) == 2
    assert shared_prefix_length([[2, 1], [3, 1]]) == 0


@pytest.mark.parametrize("four_bit", [False, True], ids=["fp32", "nf4"])
def test_groups_of_prompts_decode_like_single_ones_with_an_adapter_and_packed_weights(tiny_planner, four_bit):
    """As in the planner's rollouts: G copies of each prompt, LoRA on, and in fp32 packed weights."""
    from peft import LoraConfig, get_peft_model

    from common.models import load_base, load_tokenizer

    tokenizer = load_tokenizer(tiny_planner)
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(load_base(tiny_planner, four_bit=four_bit), config).eval()
    texts = [prompts.render(tokenizer, prompts.planner_messages(question, "short")) for question in QUESTIONS[:3]]
    texts.append(prompts.render(tokenizer, prompts.planner_messages("Say hello.", "full")))
    expected = plain_generate(model, tokenizer, texts, 20)
    with model.disable_adapter():
        assert plain_generate(model, tokenizer, texts, 20) != expected, "the adapter must change the answers"
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    order = [0, 1, 2, 3, 0, 1, 2, 0]
    with packed_linears(model, rows=8, steps=20):
        base_layers = [module.base_layer for module in model.modules() if hasattr(module, "base_layer")]
        assert all("forward" in vars(module) for module in base_layers) is not four_bit
        found = decode(
            model.get_base_model(), [ids[i] for i in order], max_new_tokens=20,
            eos_ids=end_token_ids(model, tokenizer), pad_id=tokenizer.pad_token_id,
        )  # fmt: skip
    assert found == [expected[i] for i in order]


def test_packed_weights_are_gone_after_an_error_and_never_made_for_a_few_rows(smollm2):
    model, _ = smollm2
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with pytest.raises(RuntimeError, match="inside"), packed_linears(model, rows=4, steps=16):
            assert "forward" in vars(model.lm_head)
            torch.testing.assert_close(model(input_ids=ids).logits, before, atol=1e-3, rtol=1e-3)
            with packed_linears(model, rows=4, steps=16):  # nested: shares the outer one's copies
                pass
            assert "forward" in vars(model.lm_head)
            raise RuntimeError("inside")
        assert not any("forward" in vars(module) for module in model.modules())
        assert torch.equal(model(input_ids=ids).logits, before)
        with packed_linears(model, rows=1, steps=100), packed_linears(model, rows=100, steps=1):
            assert not any("forward" in vars(module) for module in model.modules())
        with pytest.raises(RuntimeError, match="second"), packing_kept():
            with packed_linears(model, rows=4, steps=16):
                first = model.lm_head.forward
            with packed_linears(model, rows=8, steps=16):
                assert model.lm_head.forward is first, "packed once for both"
                raise RuntimeError("second")
        assert not any("forward" in vars(module) for module in model.modules())


def test_heads_are_shared_where_that_saves_most():
    few, many = list(range(10, 14)), list(range(100, 150))
    # three prompts of one question, two of another, one alone: one group per question, although all share a little
    rows = [few + many + [1, 2], few + many + [3], few + many + [4, 5, 6]]
    rows += [[*few, 7, *many, 1], [*few, 7, *many, 2], [9, 9, 9]]
    assert shared_heads(rows) == [54, 54, 54, 55, 55, 0]
    assert shared_heads([rows[5], rows[3], rows[0], rows[4], rows[1], rows[2]]) == [0, 55, 54, 55, 54, 54]
    # equal prompts share all but the last token; a prompt that is the beginning of another keeps one token of its own
    assert shared_heads([many, many, many]) == [49, 49, 49]
    assert shared_heads([many, [*many, 1], [*many, 2]]) in ([49, 49, 49], [0, 50, 50])
    assert shared_heads([[1, 2], [1, 2]]) == [0, 0]  # saves too few tokens
    assert shared_heads([[5]]) == [0]
    # one whole group where the parts would save less
    assert shared_heads([[*many, n] for n in range(5)]) == [50] * 5
    # a chain in which each prompt is the beginning of the next one, deeper than the recursion limit
    chain = [list(range(n)) for n in range(1, 400)]
    assert all(0 <= head < len(row) for head, row in zip(shared_heads(chain), chain, strict=True))


def test_sampled_tokens_follow_the_models_odds(tiny_planner):
    """Frequencies of the first tokens of 600 samples, compared with softmax(logits / temperature)."""
    model = load_base(tiny_planner, four_bit=False).eval()
    prompt, draws, temperature = [5, 6, 7], 600, 1.5
    with torch.no_grad():
        odds = torch.softmax(model(torch.tensor([prompt])).logits[0, -1] / temperature, dim=-1)
    sampled = decode(
        model, [prompt] * draws, max_new_tokens=1, eos_ids=frozenset(), pad_id=0, temperature=temperature,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    counts = torch.bincount(torch.tensor(sampled).flatten(), minlength=len(odds)).double()
    # Ten classes with about a tenth of the probability each, in the order of the vocabulary.
    classes = ((odds.double().cumsum(0) - odds / 2) * 10).long().clamp(0, 9)
    expected = torch.zeros(10, dtype=torch.float64).index_add(0, classes, odds.double()) * draws
    found = torch.zeros(10, dtype=torch.float64).index_add(0, classes, counts)
    spread = (expected * (1 - expected / draws)).sqrt().clamp(min=1)
    assert ((found - expected).abs() < 4 * spread).all(), (found, expected)
    assert (expected > 0).sum() >= 2, "the tiny model's odds are spread over several classes"


@pytest.fixture
def threads_as_before():
    """For tests that set torch's number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_batch_divided_among_processes_gives_the_tokens_of_one(smollm2, threads_as_before, temperature):
    """In fp32; with prompts of two kinds, each of which has a beginning that is read once and kept.

    Not at temperature 1: a draw may fall among tokens with odds of a millionth, where rounding decides between neighbours.
    """
    model, tokenizer = smollm2
    requests = [prompts.direct_messages(question, "few-shot") for question in SUMS]
    requests += [prompts.planner_messages(question, "short") for question in SUMS]
    ids = tokenizer([prompts.render(tokenizer, request) for request in requests], add_special_tokens=False).input_ids
    kinds = ["worker"] * len(SUMS) + ["planner"] * len(SUMS)

    def found(threads: int) -> tuple[list[list[int]], list[list[float]], dict]:
        torch.set_num_threads(threads)
        kept, log_probs = {}, []
        outputs = decode(
            model, ids, max_new_tokens=16, eos_ids=end_token_ids(model, tokenizer), pad_id=tokenizer.pad_token_id,
            temperature=temperature, generator=torch.Generator().manual_seed(5), kinds=kinds, prefixes=kept,
            log_probs=log_probs if temperature else None,
        )  # fmt: skip
        return outputs, log_probs, kept

    (one, odds_of_one, kept_by_one), (two, odds, kept) = found(1), found(2)
    assert one == two and len({tuple(row) for row in one}) > 5
    assert [len(row) for row in odds] == ([len(row) for row in two] if temperature else [])
    for mine, theirs in zip(odds, odds_of_one, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-3)
    assert {kind: tokens for kind, (tokens, _) in kept.items()} == {k: t for k, (t, _) in kept_by_one.items()}
    assert {len(tokens) > 20 for tokens, _ in kept.values()} == {True}, (
        "what a copy reads is lost, so it is read before"
    )


def test_a_small_model_reads_a_few_prompts_on_all_threads_and_decodes_them_on_one(smollm2, threads_as_before):
    model, tokenizer = smollm2
    used: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    try:
        decode(model, [[5, 6, 7], [8, 9]], max_new_tokens=3, eos_ids=frozenset(), pad_id=tokenizer.pad_token_id)
        assert used[0] == 2 and used[-1] == 1
        assert torch.get_num_threads() == 2, "what runs afterwards has all threads again"
    finally:
        hook.remove()


@pytest.mark.parametrize("apart", [0, 10**9], ids=["kept apart", "copied"])
@pytest.mark.parametrize("count", [1, 2])
def test_what_goes_into_a_layer_is_kept_for_every_row(smollm2, threads_as_before, monkeypatch, apart, count):
    """Prefix, head, drafted and forgotten tokens, rows that end early, and rows of another process."""
    model, tokenizer = smollm2
    torch.set_num_threads(count)
    monkeypatch.setattr("common.decoding.branching.MIN_KEPT_APART", apart)
    texts = [prompts.render(tokenizer, prompts.direct_messages(question)) for question in SUMS for _ in (0, 1)]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    options = {"max_new_tokens": 24, "eos_ids": end_token_ids(model, tokenizer), "pad_id": tokenizer.pad_token_id}
    kept = Kept(model.model.layers, 20, len(ids), max(map(len, ids)) + 24, model.config.hidden_size)
    told = decode(model, ids, temperature=0.7, generator=torch.Generator().manual_seed(1), kept=kept, **options)
    assert len(set(map(len, told))) > 1
    for row, (prompt, completion) in enumerate(zip(ids, told, strict=True)):
        tokens = [*prompt, *completion]
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([tokens]), output_hidden_states=True).hidden_states[20][0, :-1]
        torch.testing.assert_close(kept.states[row, : len(tokens) - 1], expected, rtol=1e-3, atol=1e-3)
