"""``fsdpq chat``: a conversation with a trained run, in a terminal or through pipes.

Answers go to standard output, everything else to standard error. The worker has the model; this
process has the terminal, and restores it however the chat ends.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fsdpq.cli.answering.chat_input import ChatInput
from fsdpq.cli.answering.generate import split_options
from fsdpq.cli.answering.options import LoadLine, answering_options, shown
from fsdpq.cli.options import RunPath, say, trust_option, warn_of_code
from fsdpq.cli.render import clean, render_notice
from fsdpq.errors import FsdpqError, UsageError

if TYPE_CHECKING:
    from fsdpq.launch.answers import AnswerSession, Choosing, Ready
    from fsdpq.launch.chat import Conversation
    from fsdpq.run_files.paths import RunFiles

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation; the system prompt stays",
    "/system TEXT": "begin anew under a system prompt; without TEXT, without one",
    "/undo": "take the last question and its answer back",
    "/retry": "ask the last question again",
    "/base": "answer as the model did before training, and back",
    "/temperature X": "0 takes the likeliest token each time",
    "/save FILE": "write the conversation: .jsonl appends a training row, else as text",
    "/info": "what the last answer took",
    "/exit": "end the chat, as Ctrl-D does",
}
"""Commands and what they do. A message that begins with a slash is written with two."""

STOPPED = {
    "stopped": "stopped",
    "length": "cut after {num_tokens} tokens: more with --max-new-tokens",
    "context": "cut: the model's context is full; /reset begins anew",
}


@click.command("chat")
@click.argument("run", type=RunPath())
@click.option("--system", help="The system prompt.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True,
    help="0 takes the likeliest token each time.",
)  # fmt: skip
@answering_options
@trust_option
def chat_command(run: Path, *, system: str | None, **options: Any) -> None:
    """Talk with the finished run in the directory RUN.

    Lines of a pipe are answered one by one, without a prompt. `/help` lists the commands.
    """
    from fsdpq.launch.answers import (
        AnswerSession,
        Choosing,
        Loading,
        open_run,
        stop_signals_raised,
    )
    from fsdpq.launch.chat import Conversation

    warn_of_code(options["trust_remote_code"])
    loading, choosing = split_options(
        options, Loading(verb="chat", needs_turns=True, compares=not options["base"]), Choosing()
    )
    _greet(open_run(run, needs_export=False))
    line = LoadLine(sys.stderr)
    line.start()
    with stop_signals_raised():
        try:
            with AnswerSession(run, loading, on_notice=_notice) as session:
                ready = session.wait_ready(line.take)
                line.clear()
                talk = Chat(session, ready, Conversation(system), choosing, base=loading.base)
                talk.run(ChatInput(sys.stdin, sys.stdout, sys.stderr))
        finally:
            line.clear()


def _notice(text: str) -> None:
    say(render_notice(text))


def _greet(files: RunFiles) -> None:
    from fsdpq.recipe.load import load_resolved

    recipe = load_resolved(files.resolved)
    say(f"{files.root.name}: {recipe.adapter.kind} on {recipe.model.name_or_path}")
    if sys.stdin.isatty():
        say("Ctrl-C stops an answer, Ctrl-D ends the chat, /help lists the commands")


class Chat:
    """Reads messages and commands until there are no more.

    Args:
        session: of a worker that is ready.
        ready: what it said.
        conversation: the turns.
        choosing: how answers are chosen.
        base: the model is that before training.
    """

    def __init__(
        self,
        session: AnswerSession,
        ready: Ready,
        conversation: Conversation,
        choosing: Choosing,
        *,
        base: bool = False,
    ) -> None:
        self._session, self._ready, self._choosing = session, ready, choosing
        self._conversation = conversation
        self._base = base
        self._last: dict[str, Any] = {}
        self._commands: dict[str, Callable[[str], None]] = {
            name.partition(" ")[0]: getattr(self, f"_do_{name[1:].partition(' ')[0]}")
            for name in HELP
            if name != "/exit"
        }

    def run(self, lines: ChatInput) -> None:
        """Talks until the input ends.

        Raises:
            FsdpqError: the worker died.
            KeyboardInterrupt: Ctrl-C a second time, while an answer was being stopped.
        """
        self._introduce()
        while (text := lines.read("base> " if self._base else "> ")) is not None:
            if not text.strip():
                continue
            if text.startswith("/") and not text.startswith("//"):
                name, _, rest = text.strip().partition(" ")
                if name in ("/exit", "/quit"):
                    return
                self._command(name, rest.strip())
            else:
                self._ask(text.removeprefix("/") if text.startswith("//") else text)

    def _introduce(self) -> None:
        ready = self._ready
        context = "" if ready.context is None else f", context of {ready.context} tokens"
        kept = f", {ready.kept:.0%} of the packed weights unpacked" if ready.kept else ""
        say(f"{ready.device}, {ready.dtype}{context}{kept}")
        for notice in ready.notices:
            _notice(notice)
        if ready.asks == "single":
            self._conversation.single = True
            note = f"rows of the format `{ready.format}` have no turns: each message is asked by "
            _notice(f"{note}itself, and the model sees none of the others")
            if self._conversation.system is not None:
                raise UsageError(
                    f"rows of the format `{ready.format}` have no place for a system prompt",
                    hint="leave out `--system`",
                )

    def _command(self, name: str, rest: str) -> None:
        command = self._commands.get(name)
        if command is None:
            self._note(f"there is no `{name}`: /help lists the commands")
            return
        try:
            command(rest)
        except FsdpqError as error:
            raise error from None
        except (OSError, ValueError) as error:
            self._note(str(error))

    def _ask(self, text: str) -> None:
        from fsdpq.launch.chat import Turn

        trained = not self._base or not self._ready.compares
        messages = self._conversation.messages(text)
        self._session.ask(messages, self._choosing, trained=trained)
        self._choosing = dataclasses.replace(self._choosing, seed=None)
        done = self._receive()
        if done["event"] == "refused":
            self._note(f"{done['message']}; {done['hint']}")
            return
        self._last = done
        if done["dropped"]:
            self._note(
                f"the conversation is longer than the context: the model no longer sees its "
                f"first {done['dropped'] // 2} turns"
            )
        if done["stop"] in STOPPED:
            self._note(STOPPED[done["stop"]].format_map(done))
        if done["answer"] or done["stop"] != "stopped":
            self._conversation.add(Turn(text, done["answer"]), done["dropped"])

    def _receive(self) -> dict[str, Any]:
        """Prints the answer as it comes; Ctrl-C stops it, a second one ends the chat."""
        is_stopping, has_text = False, False
        while True:
            try:
                event = self._session.next_event()
                if event["event"] != "text":
                    if has_text or event["event"] == "done":
                        _write("\n")
                    return event
                has_text = True
                _write(shown(event["text"], sys.stdout))
            except KeyboardInterrupt:
                if is_stopping:
                    raise
                is_stopping = True
                self._session.stop()

    def _note(self, text: str) -> None:
        say(click.style(f"({clean(text)})", dim=True))

    def _do_help(self, _rest: str) -> None:
        width = max(len(name) for name in HELP)
        for name, what in HELP.items():
            say(f"  {name.ljust(width)}  {what}")
        say('  a line that ends in \\ goes on in the next one; """ begins and ends a longer text')

    def _do_reset(self, _rest: str) -> None:
        self._conversation.reset()
        self._note("forgotten")

    def _do_system(self, rest: str) -> None:
        if self._conversation.single:
            raise ValueError("there is no place for a system prompt in rows of this format")
        self._conversation.reset()
        self._conversation.system = rest or None
        self._note("begun anew" + (" under that system prompt" if rest else ""))

    def _do_undo(self, _rest: str) -> None:
        last = self._conversation.undo()
        self._note("nothing to take back" if last is None else f"taken back: {last.question}")

    def _do_retry(self, _rest: str) -> None:
        last = self._conversation.undo()
        if last is None:
            self._note("nothing to ask again")
            return
        self._note(last.question)
        num_before = len(self._conversation.turns)
        self._ask(last.question)
        if len(self._conversation.turns) == num_before:  # no answer: the one before it stays
            self._conversation.add(last, num_dropped=0)

    def _do_base(self, _rest: str) -> None:
        if not self._ready.compares:
            if self._base:
                raise ValueError("this chat was started with --base: there is nothing else here")
            raise ValueError("memory does not hold both; start another chat with --base")
        self._base = not self._base
        now = "as it was before training" if self._base else "with what was trained"
        self._note(f"answers come from the model {now}; /retry asks the last question again")

    def _do_temperature(self, rest: str) -> None:
        try:
            value = float(rest)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise ValueError(f"the temperature is {self._choosing.temperature:g}; /temperature 0.7")
        self._choosing = dataclasses.replace(self._choosing, temperature=value)
        self._note(f"temperature {value:g}")

    def _do_save(self, rest: str) -> None:
        from fsdpq.launch.chat import save_conversation

        if not rest:
            raise ValueError("name a file: /save talk.jsonl")
        save_conversation(self._conversation, Path(rest).expanduser())
        self._note(f"saved to {rest}")

    def _do_info(self, _rest: str) -> None:
        last = self._last
        if not last:
            self._note("nothing was answered yet")
            return
        self._note(
            f"{last['num_prompt_tokens']} tokens before it, {last['num_cached_tokens']} of them "
            f"known already; then {last['num_tokens']} in {last['seconds']:.1f} s, "
            f"the first after {last['prompt_s']:.1f} s, {last['tokens_per_s']:.1f} tokens/s"
        )


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
