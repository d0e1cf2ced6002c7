"""A conversation at a terminal: a question, its plan, and the solutions as they arrive."""

from __future__ import annotations

import sys

from common.cli import say
from common.generation import Generation
from common.inference.session import REPAIRED, Answer, Session
from common.pipeline import PipelineItem
from common.plans import Plan


def show_turn(session: Session, question: str) -> Answer:
    """Ask one question; print the decision, the plan, the solutions as they arrive, the answer and its cost."""
    plan: Plan | None = None

    def on_plan(item: PipelineItem, state: str, seconds: float) -> None:
        nonlocal plan
        plan = session.plan_of(item)
        if plan is None:
            decision = "no valid plan, so: solve directly"
        elif plan.should_decompose:
            decision = f"split into {len(plan.subproblems)}"
        else:
            decision = "solve directly"
        note = " (a plan among other text)" if state == REPAIRED else ""
        _show("decision", f"{decision}{note}  [{_count(item.planner_tokens)} tokens, {seconds:.1f} s]")
        if plan is None:
            _show("written", item.planner_output or "(nothing)")
            return
        for number, part in enumerate(plan.subproblems, start=1):
            _show(f"part {number}", part)
        if plan.plan:
            _show("plan", plan.plan)

    def on_answer(wave: int, place: int, answer: Generation) -> None:
        if wave == 0 and plan is not None and plan.should_decompose:
            _show(f"solved {place + 1}", answer.text if answer.error is None else f"failed: {answer.error}")

    answer = session.run(session.ask(question, on_plan, on_answer))
    result = answer.result
    if result.error is not None:
        _show("failed", result.error)
        return answer
    if result.final is not None:
        _show("combined" if result.decomposed else "worked out", result.final.text)
    cut_off = result.final is not None and not result.final.finished
    _show("answer", result.answer or ("none, it was cut off" if cut_off else "no number in it"))
    _show(
        "cost",
        f"{_count(result.item.planner_tokens)} + {_count(result.worker_tokens)} tokens (plan + work), "
        f"{answer.seconds:.1f} s",
    )
    return answer


def _count(tokens: int | None) -> str:
    return "unknown" if tokens is None else str(tokens)


def _show(label: str, text: str) -> None:
    lines = text.splitlines() or [""]
    print(f"  {label:<11}{lines[0]}", flush=True)
    for line in lines[1:]:
        print(f"  {'':<11}{line}", flush=True)


def repl(session: Session) -> int:
    """Ask questions from the terminal until `quit` or the end of input. Returns the exit code 0."""
    _enable_line_editing()
    if sys.stdin.isatty():
        say("a question a line; quit or Ctrl-D leaves, Ctrl-C stops an answer")
    while True:
        try:
            question = input("\nquestion> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print("\n  (quit or Ctrl-D leaves)")
            continue
        if question in ("quit", "exit"):
            return 0
        if not question:
            continue
        try:
            show_turn(session, question)
        except KeyboardInterrupt:
            print("  stopped")


def _enable_line_editing() -> None:
    """Turn on line editing, with a history kept across sessions, if Python has readline (not on Windows)."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:
        return
    import atexit
    import contextlib

    from common.models import cache_dir

    history = cache_dir() / "questions_asked"
    with contextlib.suppress(OSError):  # there is no history yet
        readline.read_history_file(history)
    readline.set_history_length(1000)

    def save() -> None:
        with contextlib.suppress(OSError):  # the home folder cannot be written, so no history is kept
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    atexit.register(save)
