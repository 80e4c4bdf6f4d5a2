"""The root of what FSDP shards: a transformers model and the loss on its head.

The loss is computed inside the head, so that the head's weight is gathered for it and freed after
it; a tied weight stays gathered from the embedding to the loss. The whole ``(tokens, vocabulary)``
logits never exist: positions without loss are dropped first, the rest goes through
`fsdpq.model.chunked_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from fsdpq.errors import CheckpointError
from fsdpq.model.chunked_loss import chunked_cross_entropy
from fsdpq.model.structure import find_decoder_layers

UNSUPPORTED_HEADS = (
    "final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier",
    "output_multiplier",
)  # fmt: skip
"""Config fields that change logits after the head's product; not supported yet."""


class OutputHead(nn.Module):
    """The output embedding, with the loss.

    Args:
        linear: the head it replaces; the weight Parameter is shared, tied or not.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Returns logits, or with ``targets`` the sum of the token losses.

        Args:
            hidden: ``(..., hidden)``; with ``targets`` only the positions that carry loss,
                ``(num_targets, hidden)``.
            targets: token ids, ``(num_targets,)``, int64; may be empty.

        Returns:
            Logits ``(..., vocabulary)``, or a scalar in nats.
        """
        if targets is None:
            return functional.linear(hidden, self.weight, self.bias)
        if targets.numel() == 0:
            return hidden.float().sum() * 0.0
        return chunked_cross_entropy(hidden, self.weight, self.bias, targets)


class CausalLM(nn.Module):
    """A decoder-only transformers model whose forward returns the loss.

    Args:
        hf: the model, with a plain linear head.

    Attributes:
        hf: the transformers model; its head is an `OutputHead`.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        config = hf.config.get_text_config()
        scaled = [f for f in UNSUPPORTED_HEADS if getattr(config, f, None) not in (None, 1.0)]
        if scaled:
            raise CheckpointError(
                f"`{type(hf).__name__}` changes its logits by `{scaled[0]}`, which the chunked "
                "loss does not do yet",
                hint="train a model of another family",
            )
        hf.set_output_embeddings(OutputHead(hf.get_output_embeddings()))  # pyright: ignore[reportArgumentType]
        self.hf = hf

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

    def apply_checkpointing(self) -> None:
        """Turns on activation checkpointing of every decoder layer, in place.

        transformers checkpoints a layer's ``forward`` rather than ``__call__``, so that FSDP's
        hooks stay outside.

        Raises:
            CheckpointError: the family does not support it.
        """
        try:
            self.hf.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            hint = "add `fsdp.activation_checkpointing=none` to the command line"
            raise CheckpointError(str(error), hint=hint) from error

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
        packing = {} if position_ids is None else {"position_ids": position_ids}
        hidden = self.hf.base_model(
            input_ids=input_ids, use_cache=False, **packing
        ).last_hidden_state
        kept = hidden.reshape(-1, hidden.shape[-1]).index_select(0, loss_positions)
        if targets.numel() == 0:
            # An empty micro-batch still takes part in every collective of the backward pass.
            kept = hidden
        return self.head(kept, targets)

    @torch.no_grad()
    def next_token_logits(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Returns the logits after the last token, ``(rows, vocabulary)``; extends ``cache``.

        `fsdpq.fsdp.wrap` registers this as a second forward, so that FSDP gathers for it too.
        """
        output = self.hf(
            input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1]
