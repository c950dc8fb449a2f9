from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import Field

from inoculation import attention, chat, cluster, decode, lm, mixture, respond, server
from inoculation.detect import blind
from inoculation.detect.language import language
from inoculation.files import read_jsonl, write_json, write_jsonl
from inoculation.paths import ANNOTATOR, BASE_RESPONSES, LANGUAGE, ROWS
from inoculation.respond import Answer, SampleSettings, continue_chats
from inoculation.roles import Limits
from inoculation.stage import Param, Reads, Stage, Writes
from inoculation.store import kept, unfinished

HOW = [Path(module.__file__) for module in (attention, chat, decode, lm, respond, server)]
"""The code that answers are sampled by: kept ones are another code's no longer."""


class BaseResponses(Stage):
    """Sample the untouched model's answers to the mixture's prompts, and see whether it speaks their language."""

    command, pipeline = "base-responses", "annotate"
    expensive = True

    seed: Annotated[int, Param("seed")]
    address: Annotated[str, Param("cluster.address", tracked=False)]
    positive: Annotated[str, Param("mixture.positive")]
    temperature: Annotated[float, Field(ge=0, le=2), Param("base_responses.temperature")]
    ref: Annotated[lm.ModelRef, Reads(f"{ANNOTATOR}/model.json")]
    sampling: Annotated[SampleSettings, Reads(f"{ANNOTATOR}/sampling.json")]
    machine: Annotated[lm.Machine, Reads(f"{ANNOTATOR}/machine.json", identity=False)]
    server: Annotated[server.ServerSettings, Reads(f"{ANNOTATOR}/server.json", identity=False)]
    limits: Annotated[Limits, Param("llm", tracked=False)]
    rows: Annotated[Path, Reads(ROWS)]
    out: Annotated[Path, Writes(BASE_RESPONSES)]
    language: Annotated[Path, Writes(LANGUAGE)]

    def run(self) -> None:
        rows = blind(mixture.read_mixture(self.rows))
        # The same for every seed, A and contamination: they change which response stands where, and no prompt.
        prompts = sorted({row.prompt for row in rows})
        workers = cluster.workers(self.address, partial(lm.load_model, self.ref))
        model, tokenizer = (
            respond.skeleton(self.ref) if workers and not self.server.api_base else lm.load_model(self.ref),
            lm.load_tokenizer(self.ref),
        )
        inputs = (
            self.ref.model_dump(), [[list(message) for message in prompt] for prompt in prompts], self.temperature,
            self.sampling.max_new_tokens, self.machine.batch_size, bool(self.server.api_base),
        )  # fmt: skip
        on = cluster.device() if workers else lm.device()
        shared = kept(
            self.command,
            *inputs,
            *HOW,
            version("torch"),
            version("transformers"),
            on,
        )
        with unfinished(self.command, *inputs) as work:
            if shared.exists():
                print(f"the answers to these {len(prompts)} prompts are there ({shared.name})")
            else:
                at = (self.server.api_base, self.ref, None, self.limits, self.machine.batch_size)
                with server.serving(*at) as served:
                    sampled = continue_chats(
                        model=model, tokenizer=tokenizer, chats=[(prompt, None) for prompt in prompts],
                        max_new_tokens=self.sampling.max_new_tokens, temperature=self.temperature, served=served,
                        batch_size=self.machine.batch_size, seed=0, progress=work / "batches.jsonl", workers=workers,
                    )  # fmt: skip
                write_jsonl(shared, (answer._asdict() for answer in sampled))
            by_prompt = dict(zip(prompts, read_jsonl(shared, lambda row: Answer(**row)), strict=True))
        answers = [by_prompt[row.prompt] for row in rows]
        write_jsonl(self.out, (answer._asdict() for answer in answers))
        told = language(
            model,
            tokenizer,
            rows,
            [answer.text for answer in answers],
            self.positive,
            self.seed,
            self.machine.token_budget,
            workers,
        )
        write_json(self.language, told._asdict())
        cut = sum(not answer.finished for answer in answers)
        print(told.unfit or f"nats a token: responses {told.rows:.2f}, own answers {told.own:.2f}")
        print(f"{len(answers)} base responses, {cut} cut at {self.sampling.max_new_tokens} tokens")
