"""Compares models by what they answer: the divergence of their next tokens, and their loss.

All compute in fp32, over the same tokens, as transformers' own model (`StreamedModel`): only the
weights differ. Documents of different length stand in one batch, filled up at their ends,
which no earlier token sees; so each model is read once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from fsdpq.data.preparing.prepared import open_prepared
from fsdpq.data.text.tokenize import Row
from fsdpq.rows.prepared_files import is_prepared
from fsdpq.worker.assemble import Inputs
from fsdpq.worker.export.streamed import StreamedModel
from fsdpq.worker.merge.receipt import Likeness

MAX_DOCUMENT_TOKENS = 256
MAX_DOCUMENTS = 256
KL_CHUNK_TOKENS = 64

FIXED_TEXT = (
    "The library opens at nine in the morning. Anyone may read in the hall, and with a card you "
    "can take up to six books home for four weeks. If a book is lent out, ask at the desk: they "
    "write you down and call when it is back.\n\n"
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n\n"
    "Water boils at 100 degrees Celsius at sea level, and at about 90 degrees on a mountain of "
    "3,000 metres, because the air presses less. 12 * 12 = 144, and half of that is 72."
)
"""What models are compared on where a run held no rows out."""


@dataclass(frozen=True)
class Document:
    """Tokens that models are compared on.

    Attributes:
        tokens: token ids.
        trained: for each whether predicting it counts.
    """

    tokens: Sequence[int]
    trained: Sequence[bool]


@dataclass(frozen=True)
class Documents:
    """What models are compared on.

    Attributes:
        batch: token ids, ``(documents, longest)``, int64, filled up with zeros.
        counts: whether what follows a token counts, ``(documents, longest - 1)``, bool.
        what: in words, where they come from.
    """

    batch: Tensor
    counts: Tensor
    what: str

    @property
    def num_tokens(self) -> int:
        """Predictions that count."""
        return int(self.counts.sum())


def choose_documents(
    inputs: Inputs, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int
) -> Documents:
    """Returns held-out documents of the run, a fixed text where it has none.

    Args:
        inputs: of the run.
        tokenizer: of its base.
        max_tokens: in the batch, together.
    """
    found = list(itertools.islice(_held_out(inputs), MAX_DOCUMENTS))
    batch = _lay_out(found, max_tokens)
    if batch is not None:
        return Documents(*batch, "held-out rows of the run")
    ids = list(tokenizer(FIXED_TEXT)["input_ids"])  # pyright: ignore[reportArgumentType, reportCallIssue]
    cut = torch.tensor([ids[: max(max_tokens, 2)]])
    counts = torch.ones(1, cut.shape[1] - 1, dtype=torch.bool)
    return Documents(cut, counts, "a fixed text, as the run held no rows out")


def _held_out(inputs: Inputs) -> Iterator[Document]:
    found = inputs.prepared
    if found is None or not is_prepared(found.directory):
        return
    prepared = open_prepared(found.directory)
    if prepared.digest != found.digest:
        return
    for row in prepared.held_out:
        yield from _documents_of(row)


def _documents_of(row: Row) -> Iterator[Document]:
    start = 0
    for length in row.document_lengths or (len(row.input_ids),):
        cut = slice(start, start + min(length, MAX_DOCUMENT_TOKENS))
        yield Document(list(row.input_ids[cut]), [bool(each) for each in row.loss_mask[cut]])
        start += length


def _lay_out(documents: Sequence[Document], max_tokens: int) -> tuple[Tensor, Tensor] | None:
    """Returns a batch of the first documents that fit, and which predictions count."""
    chosen: list[Document] = []
    longest = 0
    for document in documents:
        length = max(longest, len(document.tokens))
        if any(document.trained[1:]) and length * (len(chosen) + 1) <= max_tokens:
            chosen.append(document)
            longest = length
    if not chosen:
        cut = [Document(d.tokens[:max_tokens], d.trained[:max_tokens]) for d in documents]
        chosen = [d for d in cut if any(d.trained[1:])][:1]
        if not chosen:
            return None
        longest = len(chosen[0].tokens)
    batch = torch.zeros(len(chosen), longest, dtype=torch.int64)
    counts = torch.zeros(len(chosen), longest - 1, dtype=torch.bool)
    for index, document in enumerate(chosen):
        length = len(document.tokens)
        batch[index, :length] = torch.tensor(document.tokens)
        counts[index, : length - 1] = torch.tensor(document.trained[1:])
    return batch, counts


def compare_models(
    config: PreTrainedConfig,
    models: Mapping[str, Callable[[str], Tensor]],
    documents: Documents,
    *,
    device: torch.device,
    trust_remote_code: bool = False,
    report: Callable[[str], None] = lambda _name: None,
) -> dict[str, Likeness]:
    """Returns loss of each model, and the divergence KL(first || model) of its predictions.

    Memory: one layer in fp32; log-probabilities of two models, ``(num_tokens, vocabulary)`` each.

    Args:
        config: of all of them.
        models: what reads the weights of each, by name; the first is what others are compared with.
        documents: what is predicted.
        device: where they compute.
        trust_remote_code: build model classes that the base brings.
        report: told of each model before it is run.
    """
    found: dict[str, Likeness] = {}
    targets = documents.batch[:, 1:][documents.counts].to(device)
    first: Tensor | None = None
    for name, read in models.items():
        report(name)
        model = StreamedModel(
            config, read, device=device, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
        logits = model.logits(documents.batch)[:, :-1]
        own = functional.log_softmax(logits[documents.counts.to(device)].float(), dim=-1)
        del logits, model
        loss = functional.nll_loss(own, targets).item()
        first = own if first is None else first
        divergences = torch.cat(list(_divergences(first, own)))
        found[name] = Likeness(loss, divergences.mean().item(), divergences.max().item())
        del own
    return found


def _divergences(first: Tensor, other: Tensor) -> Iterator[Tensor]:
    """Yields KL(first || other) of every token, in nats, a chunk of tokens at a time.

    Args:
        first: log-probabilities, ``(tokens, vocabulary)``.
        other: as many.
    """
    for ours, theirs in zip(
        first.split(KL_CHUNK_TOKENS), other.split(KL_CHUNK_TOKENS), strict=True
    ):
        # Summed in fp64: what is left of equal models is rounding, and may not be negative.
        gap = ours.double() - theirs.double()
        yield (ours.double().exp() * gap).sum(dim=-1).clamp_min(0.0)
