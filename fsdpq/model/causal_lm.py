"""The root of what FSDP shards: a transformers model and the loss on its head.

The loss is computed inside the head, so that the head's weight is gathered for it and freed after
it; a tied weight stays gathered from the embedding to the loss. The whole ``(tokens, vocabulary)``
logits never exist: positions without loss are dropped first, the rest goes through
`fsdpq.model.chunked_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from fsdpq.errors import CheckpointError
from fsdpq.model.chunked_loss import chunked_cross_entropy
from fsdpq.model.document_attention import document_starts, longest_document
from fsdpq.model.packing import document_bounds, document_mask
from fsdpq.model.router_loss import RouterLoss
from fsdpq.model.structure import find_decoder_layers
from fsdpq.model.token_scores import score_tokens
from fsdpq.protocols import Losses

HEAD_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Config fields that scale logits. What a field means depends on the family: Granite divides by
``logits_scaling``, HyperCLOVA X multiplies by it."""


def logit_scale(config: PreTrainedConfig) -> float:
    """Returns the factor on the head's product that transformers applies for this config.

    Raises:
        CheckpointError: a family scales its logits in a way that is not known here.
    """
    scaled = [f for f in HEAD_SCALES if getattr(config, f, None) not in (None, 1.0)]
    family = str(config.model_type)
    if not scaled:
        return 1.0
    if scaled == ["logit_scale"] and family.startswith("cohere"):
        return float(config.logit_scale)
    if scaled == ["logits_scaling"] and family.startswith("granite"):
        return 1.0 / float(config.logits_scaling)
    raise CheckpointError(
        f"models of type `{family}` change their logits by `{scaled[0]}`, which the chunked loss "
        "does not do yet",
        hint="train a model of another family",
    )


class OutputHead(nn.Module):
    """The output embedding, with the loss.

    Args:
        linear: the head it replaces; the weight Parameter is shared, tied or not.
        scale: the loss is that of ``scale`` times the logits (Cohere, Granite).
        softcap: and then of ``softcap * tanh(logits / softcap)`` (Gemma 2).
    """

    def __init__(
        self, linear: nn.Linear, *, scale: float = 1.0, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = scale
        self.softcap = softcap

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, scores: bool = False
    ) -> Tensor:
        """Returns logits, or with ``targets`` the sum of the token losses, or their ``scores``.

        Logits are the head's product alone: transformers scales and caps them afterwards.

        Args:
            hidden: ``(..., hidden)``; with ``targets`` only the positions that carry loss,
                ``(num_targets, hidden)``.
            targets: token ids, ``(num_targets,)``, int64; may be empty.
            scores: see `fsdpq.model.token_scores`.

        Returns:
            Logits ``(..., vocabulary)``, or a scalar in nats, or scores ``(num_targets, 2)``.
        """
        if targets is None:
            return functional.linear(hidden, self.weight, self.bias)
        if scores:
            return score_tokens(
                hidden * self.scale, self.weight, self.bias, targets, softcap=self.softcap
            )
        if targets.numel() == 0:
            # Every trained weight gets a gradient, or ranks would reduce different groups.
            trained = [p.float().sum() for p in self.parameters() if p.requires_grad]
            return torch.stack([hidden.float().sum(), *trained]).sum() * 0.0
        # Scaling the input scales the logits; heads with a scale have no bias.
        hidden = hidden if self.scale == 1.0 else hidden * self.scale
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets, softcap=self.softcap)


class CausalLM(nn.Module):
    """A decoder-only transformers model whose forward returns the loss.

    Args:
        hf: the model, with a plain linear head.
        layer_sources: the checkpoint's layer of every decoder layer; by default the same one.

    Attributes:
        hf: the transformers model; its head is an `OutputHead`.
        layer_sources: as given.
        layers_prefix: what stands before a layer's number in names (``model.layers.``).
        autocast_dtype: what forward autocasts to, None for no autocast.
        router_loss: of a mixture that is trained with its load-balancing loss, else None.
        flattens_packed: compute packed rows as one long row: flash attention keeps documents apart
            within a row only.
        longest_alone: the attention of packed documents up to this many tokens is computed by
            themselves (`fsdpq.model.document_attention`), that of longer ones with a mask.
        masks_packed: make the mask of packed rows, which the family makes without position ids.
    """

    autocast_dtype: torch.dtype | None = None
    router_loss: RouterLoss | None = None
    flattens_packed: bool = False
    longest_alone: int = 0
    masks_packed: bool = False

    def __init__(self, hf: PreTrainedModel, layer_sources: Sequence[int] | None = None) -> None:
        super().__init__()
        config = hf.config.get_text_config()
        head = OutputHead(
            hf.get_output_embeddings(),  # pyright: ignore[reportArgumentType]
            scale=logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )
        hf.set_output_embeddings(head)
        self.hf = hf
        layers = self.decoder_layers
        self.layer_sources = tuple(layer_sources or range(len(layers)))
        self.layers_prefix = next(f"{n}." for n, module in hf.named_modules() if module is layers)

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The list of decoder layers."""
        return find_decoder_layers(self.hf)

    @property
    def head(self) -> OutputHead:
        """The output embedding."""
        return self.hf.get_output_embeddings()  # pyright: ignore[reportReturnType]

    @property
    def embedding(self) -> nn.Module:
        """The input embedding."""
        return self.hf.get_input_embeddings()

    @property
    def embedding_groups(self) -> list[list[nn.Module]]:
        """Embedding and head, together where they share their weight."""
        if self.embedding.weight is self.head.weight:
            return [[self.embedding, self.head]]
        return [[self.embedding], [self.head]]

    def _autocast(self, device_type: str) -> AbstractContextManager[Any]:
        if self.autocast_dtype is None:
            return nullcontext()
        # No cache: it would hold casts of gathered weights beyond their layer.
        return torch.autocast(device_type, self.autocast_dtype, cache_enabled=False)

    def forward(
        self,
        input_ids: Tensor,
        loss_positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Returns the sum of the token losses of a micro-batch, in nats.

        Rows are padded at the right and attention is causal, so padding needs no mask.

        Args:
            input_ids: ``(rows, tokens)``, int64.
            loss_positions: indices into the flattened ``rows * tokens`` positions whose next
                token carries loss, ``(num_targets,)``, int64.
            targets: those next tokens, ``(num_targets,)``, int64.
            position_ids: of packed rows, ``(rows, tokens)``, int64: where they restart, a new
                document begins that does not see the ones before. Transformers builds the mask
                from them as long as no attention mask is given (`fsdpq.model.packing`).
        """
        with self._autocast(input_ids.device.type):
            hidden = self._decode(input_ids, position_ids).last_hidden_state
            return self._token_losses(hidden, loss_positions, targets)

    def losses(
        self,
        input_ids: Tensor,
        loss_positions: Tensor,
        targets: Tensor,
        position_ids: Tensor | None,
        is_token: Tensor,
    ) -> Losses:
        """Returns what forward does, and the load-balancing loss of ``router_loss``.

        Evaluation calls forward: its loss is that of tokens alone. `fsdpq.fsdp.wrap` registers this
        as another forward.

        Args:
            input_ids: as forward's.
            loss_positions: as forward's.
            targets: as forward's.
            position_ids: as forward's.
            is_token: False at padding, ``(rows, tokens)``, bool; one token at least is none.
        """
        if self.router_loss is None:
            raise RuntimeError("this model is trained without a load-balancing loss")
        with self._autocast(input_ids.device.type):
            output = self._decode(input_ids, position_ids, record_routers=True)
            tokens = self._token_losses(output.last_hidden_state, loss_positions, targets)
            return Losses(tokens, self.router_loss(output.router_logits, is_token))

    def _decode(
        self, input_ids: Tensor, position_ids: Tensor | None, *, record_routers: bool = False
    ) -> Any:
        """Returns the output of the decoder."""
        options: dict[str, Any] = {}
        if position_ids is not None:
            if self.flattens_packed:
                input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(1, -1)
            options = {"position_ids": position_ids, **self._tell_documents(position_ids)}
        if record_routers or getattr(self.hf.config, "output_router_logits", False):
            options["output_router_logits"] = record_routers
        return self.hf.base_model(input_ids=input_ids, use_cache=False, **options)

    def _tell_documents(self, position_ids: Tensor) -> dict[str, Any]:
        """Returns what attention needs beside the position ids of packed rows."""
        if self.flattens_packed:
            return document_bounds(position_ids)
        if self.masks_packed:
            mask = document_mask(self.hf, position_ids, self.embedding.weight.dtype)  # pyright: ignore
            return {"attention_mask": mask}
        starts = document_starts(position_ids) if self.longest_alone else None
        if starts is not None and longest_document(starts) <= self.longest_alone:
            return {"attention_mask": starts}
        return {}

    def _token_losses(self, hidden: Tensor, loss_positions: Tensor, targets: Tensor) -> Tensor:
        # An empty micro-batch still takes part in every collective of the backward pass.
        kept = hidden
        if targets.numel():
            kept = hidden.reshape(-1, hidden.shape[-1]).index_select(0, loss_positions)
        return self.head(kept, targets)

    @torch.no_grad()
    def token_scores(self, input_ids: Tensor, positions: Tensor, targets: Tensor) -> Tensor:
        """Returns how likely each target is after its position, ``(num_targets, 2)``, fp32.

        `fsdpq.fsdp.wrap` registers this as another forward. What the numbers are is in
        `fsdpq.model.token_scores`.

        Args:
            input_ids: ``(rows, tokens)``, int64, padded at the right.
            positions: indices into the flattened ``rows * tokens`` positions, ``(num_targets,)``,
                int64; may repeat, may be none.
            targets: the token after each, ``(num_targets,)``, int64.
        """
        with self._autocast(input_ids.device.type):
            hidden = self._decode(input_ids, None).last_hidden_state
            kept = hidden.reshape(-1, hidden.shape[-1]).index_select(0, positions)
            return self.head(kept, targets, scores=True)

    @torch.no_grad()
    def next_token_logits(
        self, input_ids: Tensor, cache: Cache | None, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Returns the logits after the last token, ``(rows, vocabulary)``; extends ``cache``.

        `fsdpq.fsdp.wrap` registers this as a second forward, so that FSDP gathers for it too.

        Args:
            input_ids: ``(rows, tokens)``, int64: what the cache does not hold yet.
            cache: of the tokens before; None for no cache at all.
            attention_mask: of rows that are padded at the left, ``(rows, tokens so far)``, int64:
                0 at padding. Positions are counted without it.
        """
        options: dict[str, Tensor] = {}
        if attention_mask is not None:
            places = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            options = {"attention_mask": attention_mask}
            options["position_ids"] = places[:, -input_ids.shape[1] :]
        with self._autocast(input_ids.device.type):
            output = self.hf(
                input_ids=input_ids, past_key_values=cache, use_cache=cache is not None,
                logits_to_keep=1, **options,
            )  # fmt: skip
        return output.logits[:, -1]
