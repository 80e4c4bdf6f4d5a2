"""Answers questions that come as JSON lines, for ``fsdpq generate`` and ``fsdpq chat``.

Standard input has one request a line, standard output one event; whatever a library prints goes to
standard error. The tables are the contract with `fsdpq.launch.answers`.

requests:
    ``ask``   id, messages (role and content), max_new_tokens, temperature, top_k, top_p,
              repetition_penalty, seed (null goes on with the generator), trained (whether to answer
              with what was trained)
    ``stop``  id: the answer ends here; the end of the input ends it too, and the process

events:
    ``load``     done, total: bytes of the base
    ``ready``    model, device, asks (`fsdpq.data.text.render.RowRenderer.asks`), format, context,
                 dtype, kept (share of the quantized weights that is dequantized for good),
                 compares (whether ``trained`` may change), notices
    ``text``     id, text: the next piece of the answer
    ``done``     id, the fields of `fsdpq.worker.answering.answerer.Answer`, dropped (messages that
                 did not fit the context any more)
    ``refused``  id, message, hint: there is no answer; the process goes on
"""

from __future__ import annotations

import dataclasses
import json
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase

from fsdpq import dist
from fsdpq.data.templates.choose import choose_template
from fsdpq.data.templates.jinja_text import TemplateError
from fsdpq.data.text.tokenize import RowTokenizer
from fsdpq.errors import UsageError
from fsdpq.recipe.load import load_resolved
from fsdpq.recipe.precision import precision_of
from fsdpq.recipe.root import Recipe
from fsdpq.run_files.paths import RunFiles
from fsdpq.training.sample import Sampling
from fsdpq.worker.answering.answerer import ChatAnswerer, build_asker
from fsdpq.worker.answering.model import (
    TrainedSwitch,
    answering_recipe,
    assemble_for_answers,
    cast_trained,
    keep_matrices,
)
from fsdpq.worker.assemble import Inputs, read_inputs, stop_ids
from fsdpq.worker.export.formats import FORMATS
from fsdpq.worker.keeping.saved_weights import load_saved_weights
from fsdpq.worker.tokenizer import load_tokenizer

Request = dict[str, Any]
Tell = Callable[[Request], None]


@dataclass(frozen=True)
class Wanted:
    """What is to answer.

    Attributes:
        device_type: ``cuda`` or ``cpu``.
        trained: False leaves the model as it was before training, and never loads more.
        checkpoint: directory of a checkpoint; None is what the run exported.
        needs_turns: ask in turns, also where rows were plain texts.
        compares: keep the initial values of what was trained too, for requests without it.
        dequantize: ``auto``, ``always`` or ``never``; see `keep_matrices`.
        trust_remote_code: run code that the model brings.
    """

    device_type: str
    trained: bool = True
    checkpoint: Path | None = None
    needs_turns: bool = False
    compares: bool = False
    dequantize: str = "auto"
    trust_remote_code: bool = False


def serve_answers(files: RunFiles, wanted: Wanted, output: TextIO) -> None:
    """Loads what a run trained and answers until standard input ends; events go to ``output``.

    Raises:
        FsdpqError: the model cannot be loaded.
    """
    tell = event_writer(output)
    recipe = answering_recipe(load_resolved(files.resolved), wanted.device_type)
    inputs = read_inputs(files, trust_remote_code=wanted.trust_remote_code)
    device = dist.start_process_group(wanted.device_type)
    dist.seed_everything(recipe.training.seed)
    tokenizer = load_tokenizer(inputs.model_dir, trust_remote_code=wanted.trust_remote_code)
    asks = build_asker(recipe, inputs.data, tokenizer)
    notices: list[str] = []
    if wanted.needs_turns and asks.renderer.asks == "text":
        asks = take_turns(recipe, inputs, tokenizer)
        notices.append(
            f"trained on rows of the format `{recipe.data.format}`, which have no turns: messages "
            "go through the model's chat template, which training did not use"
        )
    assembled = assemble_for_answers(
        recipe,
        inputs,
        device=device,
        report_load=lambda done, total: tell({"event": "load", "done": done, "total": total}),
    )
    switch = TrainedSwitch(assembled, device) if wanted.trained and wanted.compares else None
    if wanted.trained and wanted.checkpoint is not None:
        load_saved_weights(assembled, wanted.checkpoint)
    elif wanted.trained:
        exported = files.exported(recipe.export.format)
        FORMATS[recipe.export.format].load(assembled, exported)
    cast_trained(assembled, recipe)
    kept = keep_matrices(assembled, recipe, wanted.dequantize, device)
    stops = stop_ids(inputs.model_dir, tokenizer)
    answerer = ChatAnswerer(assembled, tokenizer, asks=asks, stop_ids=stops, device=device)
    ready = describe(recipe, asks, device)
    compares = switch is not None and switch.is_usable
    tell({
        **ready, "context": answerer.context, "kept": kept, "compares": compares,
        "notices": [*notices, *assembled.notices],
    })  # fmt: skip
    AnswerServer(answerer, switch if compares else None, tell).serve(sys.stdin)


def event_writer(output: TextIO) -> Tell:
    """Returns what writes an event to ``output``, at once."""

    def tell(event: Request) -> None:
        output.write(json.dumps(event, ensure_ascii=False) + "\n")
        output.flush()

    return tell


def describe(recipe: Recipe, asks: RowTokenizer, device: torch.device) -> Request:
    """Returns what the event ``ready`` says of a model."""
    on_gpu = device.type == "cuda"
    return {
        "event": "ready",
        "model": recipe.model.name_or_path,
        "device": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "asks": asks.renderer.asks,
        "format": asks.format_name,
        "dtype": precision_of(recipe).words,
    }


def take_turns(recipe: Recipe, inputs: Inputs, tokenizer: PreTrainedTokenizerBase) -> RowTokenizer:
    """Returns what asks in turns by the model's chat template, of a run over plain texts.

    Raises:
        UsageError: there is no template.
    """
    file_text = None if inputs.data is None else inputs.data.chat_template
    template = choose_template(tokenizer, recipe.data.chat_template, file_text)
    if template is None:
        raise UsageError(
            "this run was trained on plain texts and its model has no chat template: there is "
            "nobody to talk to",
            hint="`fsdpq generate RUN --prompt TEXT` goes on with a text",
        )
    return RowTokenizer(tokenizer, recipe.data, "messages", template=template)


class AnswerServer:
    """Reads requests in a thread, so that one can be told to stop, and answers them in order.

    Args:
        answerer: of the model.
        switch: takes what was trained out and puts it back; None where requests may not ask so.
        tell: writes an event.
    """

    def __init__(self, answerer: ChatAnswerer, switch: TrainedSwitch | None, tell: Tell) -> None:
        self._answerer, self._switch, self._tell = answerer, switch, tell
        self._asked: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._stopped: set[int] = set()
        self._ended = threading.Event()

    def serve(self, requests: TextIO | Iterable[str]) -> None:
        """Answers until ``requests`` end."""
        reader = threading.Thread(target=self._read, args=(requests,), daemon=True)
        reader.start()
        while (request := self._asked.get()) is not None:
            self._take(request)

    def _read(self, requests: Iterable[str]) -> None:
        for line in requests:
            request: Request = json.loads(line)
            if request["request"] == "stop":
                self._stopped.add(request["id"])
            else:
                self._asked.put(request)
        self._ended.set()
        self._asked.put(None)

    def _take(self, request: Request) -> None:
        number = request["id"]

        def refuse(message: str, hint: str) -> None:
            self._tell({"event": "refused", "id": number, "message": message, "hint": hint})

        try:
            self._answer(request, refuse)
        except TemplateError as error:
            refuse(str(error), "ask in another way, or use another `data.chat_template`")
        except torch.OutOfMemoryError:
            self._answerer.prefix.clear()
            torch.cuda.empty_cache()
            refuse(
                "the memory of the GPU ran out",
                "ask a shorter conversation, or use `--dequantize never` or `--device cpu`",
            )

    def _answer(self, request: Request, refuse: Callable[[str, str], None]) -> None:
        number, answerer = request["id"], self._answerer
        if self._switch is not None and self._switch.put(request["trained"]):
            answerer.prefix.clear()
        ids, dropped = answerer.fit(request["messages"], request["max_new_tokens"])
        if answerer.context is not None and len(ids) >= answerer.context:
            message = f"the message has {len(ids)} tokens with what goes around it, and the "
            message += f"model's context is {answerer.context}"
            refuse(message, "ask a shorter one")
            return
        if request["seed"] is not None:
            dist.seed_everything(request["seed"])
        answer = answerer.reply(
            ids,
            max_new_tokens=request["max_new_tokens"],
            sampling=Sampling(
                temperature=request["temperature"],
                top_k=request["top_k"],
                top_p=request["top_p"],
                repetition_penalty=request["repetition_penalty"],
            ),
            on_text=lambda text: self._tell_text(number, text),
            is_stopped=lambda: number in self._stopped or self._ended.is_set(),
        )
        done = {"event": "done", "id": number, **dataclasses.asdict(answer)}
        self._tell({**done, "dropped": len(dropped)})

    def _tell_text(self, number: int, text: str) -> None:
        if text:
            self._tell({"event": "text", "id": number, "text": text})
