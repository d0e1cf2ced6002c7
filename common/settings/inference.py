"""All settings of `inference_vllm.py`. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from common.errors import UserErrors
from common.plans import MAX_SUBPROBLEM_CHARS, MAX_SUBPROBLEMS
from common.settings.fields import advice_problem, check_values, setting, url_problem
from common.settings.secrets import api_key_problem

ADAPTER_NAME = "recursive_reasoner"


@dataclass(kw_only=True)
class ServingArgs:
    """Settings of `inference_vllm.py`. Lengths are in tokens, times in seconds. Each field's help text documents it."""

    # fmt: off
    base_url: str = setting("http://localhost:8000/v1", "server", "address of the OpenAI-compatible server", metavar="URL")
    model: str | None = setting(None, "server", "name of the base model on the server (default: the entry of /v1/models without a parent)", metavar="NAME")
    lora_adapter: str = setting(ADAPTER_NAME, "server", "name of the planner's adapter on the server", metavar="NAME")
    worker_url: str | None = setting(None, "server", "another server for the worker (default: the same)", metavar="URL")
    worker_model: str | None = setting(None, "server", "name of the worker's model on its server (default: the base model there)", metavar="NAME")
    api_key: str | None = field(default=None, repr=False, metadata={"group": "server", "help": "key of the servers; better in $OPENAI_API_KEY, which no process list shows; never printed or stored", "metavar": "KEY"})
    timeout: float = setting(120.0, "server", "seconds that one attempt at one request may take", positive=True)
    retries: int = setting(2, "server", "further attempts at a failed request; each pause is about twice as long as the one before", minimum=0)
    concurrency: int = setting(32, "server", "largest number of requests at the same time", positive=True)
    probe: bool = setting(True, "server", "check at start that the base model is not answered by the adapter")

    max_tokens: int = setting(512, "planner", "longest plan, in tokens", positive=True)
    temperature: float = setting(0.7, "planner", "sampling temperature of plans (--benchmark: 0, as in training's scoreboard, unless given); the worker is greedy", minimum=0)
    structured: bool = setting(True, "planner", "ask for plans that match a JSON schema, if the server accepts one")

    training_config: str | None = setting(None, "prompts", "take the settings below from this training_config.json (default: the one in the adapter's folder, if server and folder are on this machine)", metavar="FILE")
    planner_style: Literal["full", "short"] = setting("full", "prompts", "wording the planner was trained with")
    worker_style: Literal["instruct", "worked", "few-shot"] = setting("instruct", "prompts", "wording the worker had in training")
    worker_context: Literal["question", "none"] = setting("question", "prompts", "what a subproblem's prompt shows besides the subproblem, as in training: the whole question, or none of it")
    plan_to_worker: bool = setting(False, "prompts", "show the worker the plan's text, as in training")
    worker_max_tokens: int = setting(256, "prompts", "longest answer of the worker to one prompt, in tokens", positive=True)
    max_subproblems: int = setting(MAX_SUBPROBLEMS, "prompts", "a plan with more subproblems is invalid", positive=True)
    max_subproblem_chars: int = setting(MAX_SUBPROBLEM_CHARS, "prompts", "a plan with a subproblem of more characters is invalid", positive=True)

    dataset: str | None = setting(None, "benchmark", "held-out questions: as in grpo_training.py (default: what the adapter was trained for, else openai/gsm8k)", metavar="SOURCE")
    samples: int = setting(100, "benchmark", "number of held-out questions", positive=True)
    # fmt: on

    def validate(self) -> None:
        """Check every value.

        Raises:
            UserErrors: with all problems found, one line each.
        """
        problems = check_values(self)
        for flag, url in (("--base-url", self.base_url), ("--worker-url", self.worker_url)):
            problem = None if url is None else url_problem(url)
            if problem is not None:
                problems.append(f"{flag} {problem}")
        for flag, name in (("--lora-adapter", self.lora_adapter), ("--worker-model", self.worker_model)):
            if name == "":
                problems.append(f"{flag} is empty: name a model of the server, or leave it out")
        if (problem := advice_problem(self.plan_to_worker, self.worker_style)) is not None:
            problems.append(problem)
        if (problem := api_key_problem(self.api_key)) is not None:
            problems.append(problem)
        if problems:
            raise UserErrors(problems)


PROMPT_SETTINGS = tuple(
    spec.name for spec in fields(ServingArgs) if spec.metadata["group"] == "prompts" and spec.name != "training_config"
)
