"""What one rank computes in a step: products, dequantizations, kernels.

A multiplication and an addition are two operations. Elementwise operations are not counted here;
`fsdpq.plan.time.rates` weighs the bytes that they pass over. Of a causal row attention needs half
of its ``tokens x tokens`` products, and flash kernels do no more; ``eager`` does all. In backward
flash kernels compute the scores anew: five products for two in forward.

Tests count the products of the real step (``torch.utils.flop_counter``) and find the same numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fsdpq.plan.costs.expansion import layer_sources
from fsdpq.plan.costs.parameters import Choice, choice_of
from fsdpq.plan.shape import GroupShape, ModelShape
from fsdpq.plan.time.matrices import LayerMatrices, Matrix, Stage, layer_matrices
from fsdpq.plan.workload import Workload, workload_of
from fsdpq.recipe.root import Recipe
from fsdpq.recipe.sections.adapter import DoraOptions, LlamaProOptions
from fsdpq.recipe.sections.optimizer import MuonOptions

MUON_ITERATIONS = 5
"""Newton-Schulz steps of one update (`fsdpq.optimizer.muon`)."""

RECOMPUTED_STEP = {"full": 1, "selective": 2}
"""Every how manyth layer is computed again in backward, by ``fsdp.activation_checkpointing``."""


@dataclass(frozen=True)
class Work:
    """What one rank computes.

    Attributes:
        products: operations of products with the matrices of decoder layers.
        low_rank: of products with adapters.
        attention: of products of activations with each other.
        head: of the loss.
        update: of products of the optimizer's step.
        dequantized: weights that are dequantized.
        dequantizations: how often a matrix is dequantized.
        forward_linears: products with a matrix in forward and recomputation, adapters not counted.
        backward_linears: the same in backward.
        forward_layers: decoder layers that run forward, recomputation included.
        backward_layers: decoder layers that run backward.
        adapter_values: that adapters read and write: inputs once, outputs twice, in forward.
    """

    products: float = 0.0
    low_rank: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    update: float = 0.0
    dequantized: float = 0.0
    dequantizations: float = 0.0
    forward_linears: float = 0.0
    backward_linears: float = 0.0
    forward_layers: float = 0.0
    backward_layers: float = 0.0
    adapter_values: float = 0.0

    @property
    def flops(self) -> float:
        """All operations."""
        return self.products + self.low_rank + self.attention + self.head + self.update

    def __add__(self, other: Work) -> Work:
        """Returns the sums."""
        pairs = zip(vars(self).values(), vars(other).values(), strict=True)
        return Work(*(mine + theirs for mine, theirs in pairs))

    def __mul__(self, count: float) -> Work:
        """Returns ``count`` times as much."""
        return Work(*(count * value for value in vars(self).values()))


def step_work(recipe: Recipe, shape: ModelShape) -> Work:
    """Returns what one rank of a resolved recipe computes in an optimizer step."""
    workload = workload_of(recipe)
    total = micro_batch_work(recipe, shape, workload) * workload.micro_batches
    return total + Work(update=_update_flops(recipe, shape))


def micro_batch_work(recipe: Recipe, shape: ModelShape, workload: Workload) -> Work:
    """Returns what one rank computes for a micro-batch of rows of full length."""
    choice = choice_of(recipe, shape)
    total = Work(head=_head_flops(shape, workload, learns=_trains(choice, "head")))
    counter = _LayerCounter(recipe, shape, workload)
    every = RECOMPUTED_STEP.get(recipe.fsdp.activation_checkpointing)
    kinds: dict[int, LayerMatrices] = {}
    runs: Counter[tuple[int, str]] = Counter()
    live = trains_embedding(choice)
    for index, layer in enumerate(layers_in_order(choice)):
        kind = id(layer)
        kinds[kind] = layer
        runs[kind, "forward"] += 1
        if live or layer.learns:
            runs[kind, "backward" if live else "first backward"] += 1
            runs[kind, "recomputed"] += every is not None and index % every == 0
            live = True
    for (kind, run), count in runs.items():
        total += counter.count(kinds[kind], run) * count
    return total


def _update_flops(recipe: Recipe, shape: ModelShape) -> float:
    """Returns the products of Muon's iterations: every rank makes every whole update orthogonal."""
    if not isinstance(recipe.optimizer, MuonOptions):
        return 0.0
    total = 0.0
    for layer in layers_in_order(choice_of(recipe, shape)):
        for rows, columns in layer.trained_matrices:
            short, long = sorted((rows, columns))
            total += MUON_ITERATIONS * (4.0 * short**2 * long + 2.0 * short**3)
    return total


def trains_embedding(choice: Choice) -> bool:
    """Whether the embedding is trained, so that the first layer's input has a gradient."""
    return _trains(choice, "embedding")


def _trains(choice: Choice, name: str) -> bool:
    """Whether embedding or head, which may be one, are trained."""
    tied = "embedding" if choice.shape.tie_word_embeddings else name
    groups = [group for group in choice.shape.groups if group.name == tied]
    return any(each.use == "trained" for group in groups for each in choice.held(group).parameters)


def layers_in_order(choice: Choice) -> Iterator[LayerMatrices]:
    """Yields the decoder layers in the order of forward, those that ``llama_pro`` adds among them.

    Layers that are alike are one object.
    """
    shape, adapter = choice.shape, choice.adapter
    found: dict[int, tuple[LayerMatrices, GroupShape]] = {}
    apart = choice.names_single_layers
    for group, indices in indexed_layers(shape):
        known = None if apart else layer_matrices(choice, group, indices[0])
        for index in indices:
            found[index] = (known or layer_matrices(choice, group, index), group)
    if not isinstance(adapter, LlamaProOptions):
        yield from (found[index][0] for index in sorted(found))
        return
    new = {
        id(group): layer_matrices(choice, group, indices[0], is_new=True)
        for group, indices in indexed_layers(shape)
    }
    previous = -1
    for source in layer_sources(adapter, len(found)):
        layer, group = found[source]
        yield new[id(group)] if source == previous else layer
        previous = source


def indexed_layers(shape: ModelShape) -> Iterator[tuple[GroupShape, tuple[int, ...]]]:
    """Yields every group of decoder layers with the numbers of its layers."""
    start = 0
    for group in shape.layers:
        yield group, group.indices or tuple(range(start, start + group.count))
        start += group.count


def _head_flops(shape: ModelShape, workload: Workload, *, learns: bool) -> float:
    """Returns the products of `fsdpq.model.chunked_loss`: the last token of a row has no target."""
    targets = workload.rows * (workload.seq_len - 1)
    return 2.0 * targets * shape.vocab_size * shape.hidden_size * (3 if learns else 2)


@dataclass(frozen=True)
class _LayerCounter:
    """Counts what one decoder layer computes for a micro-batch."""

    recipe: Recipe
    shape: ModelShape
    workload: Workload

    def count(self, layer: LayerMatrices, run: str) -> Work:
        """Returns the work of ``forward``, ``recomputed``, ``backward`` or ``first backward``."""
        if run == "forward":
            return self._forward(layer.matrices)
        if run == "recomputed":
            return self._recomputed(layer)
        return self._backward(layer, live=run == "backward")

    def _forward(self, matrices: Sequence[Matrix]) -> Work:
        total = Work(attention=self._attention(forward=True), forward_layers=1)
        for matrix in matrices:
            total += self._product(matrix)
        return total

    def _product(self, matrix: Matrix) -> Work:
        tokens, adapter = self.workload.tokens, self.recipe.adapter
        drops = isinstance(adapter, DoraOptions) and adapter.dropout > 0 and matrix.rank > 0
        products = 2.0 * tokens * matrix.weights * (2 if drops else 1)
        low_rank = 2.0 * tokens * matrix.low_rank
        if isinstance(adapter, DoraOptions) and matrix.rank:
            low_rank += self.workload.layer_chunks * _norm_flops(matrix)
        return self._dequantized(matrix) + Work(
            products,
            low_rank,
            forward_linears=self._calls(matrix),
            adapter_values=tokens * _adapter_values(matrix),
        )

    def _recomputed(self, layer: LayerMatrices) -> Work:
        """Returns what backward computes again of a checkpointed layer.

        It ends at the last tensor that is kept for backward, and an operator keeps what it reads
        before it computes: the last product is not done. Where that is quantized it keeps nothing,
        and the product with B before it is not done either.
        """
        total = self._forward(layer.matrices)
        last = layer.matrices[-1]
        if not layer.ends_in_product or last.stage != Stage.LAST:
            return total
        left_out = self._dequantized(last) + Work(
            2.0 * self.workload.tokens * last.weights,
            2.0 * self.workload.tokens * last.rank * last.out_features * last.quantized,
            forward_linears=self._calls(last),
        )
        return total + left_out * -1.0

    def _backward(self, layer: LayerMatrices, *, live: bool) -> Work:
        """Returns the work of gradients.

        Args:
            layer: the layer.
            live: its input has a gradient; that of the first layer of backward has none.
        """
        tokens = self.workload.tokens
        total = Work(backward_layers=1)
        residual = live
        reaches = live  # what the matrices of a stage read has a gradient
        for stage in Stage:
            if stage == Stage.INPUT:
                reaches = live or stage in layer.trained_norms
            elif stage == Stage.ATTENDED:
                total += Work(attention=self._attention(forward=False) if reaches else 0.0)
            elif stage == Stage.MIDDLE:
                residual = residual or reaches
                reaches = residual or stage in layer.trained_norms
            found = [matrix for matrix in layer.matrices if matrix.stage == stage]
            for matrix in found:
                total += self._gradients(matrix, tokens, by_input=reaches)
            reaches = reaches or any(matrix.learns for matrix in found)
        return total

    def _gradients(self, matrix: Matrix, tokens: int, *, by_input: bool) -> Work:
        adapter, frozen = self.recipe.adapter, not matrix.trained
        drops = isinstance(adapter, DoraOptions) and adapter.dropout > 0 and matrix.rank > 0
        times = (2 if drops else 1) * by_input + matrix.trained
        rank, both = matrix.rank, matrix.low_rank
        # A by its input, B by its input, both by themselves; A's input may have no gradient.
        low_rank = 2 * both - (0 if by_input else rank * matrix.in_features)
        work = Work(
            2.0 * tokens * matrix.weights * times,
            2.0 * tokens * low_rank if rank else 0.0,
            backward_linears=self._calls(matrix) if times or rank else 0.0,
            adapter_values=2.0 * tokens * _adapter_values(matrix),
        )
        return work + self._dequantized(matrix) if by_input and frozen else work

    def _attention(self, *, forward: bool) -> float:
        shape, workload = self.shape, self.workload
        pairs = workload.tokens * workload.seq_len * shape.num_attention_heads * shape.head_dim
        if self.recipe.model.attn_implementation == "eager":
            return 4.0 * pairs * (1 if forward else 2)
        return 1.0 * pairs * (2 if forward else 5)

    def _dequantized(self, matrix: Matrix) -> Work:
        if not matrix.quantized:
            return Work()
        calls = self._calls(matrix)
        return Work(
            dequantized=calls * matrix.out_features * matrix.in_features, dequantizations=calls
        )

    def _calls(self, matrix: Matrix) -> float:
        """Returns how often a matrix is multiplied by; of experts, all that a token chose."""
        chunks = self.workload.layer_chunks
        if matrix.stacked == 1:
            return chunks
        if not matrix.quantized:
            return chunks  # one kernel for all experts
        return chunks * min(matrix.stacked, self.workload.chunk_tokens * matrix.copies)


def _adapter_values(matrix: Matrix) -> float:
    return matrix.in_features + 2.0 * matrix.out_features if matrix.rank else 0.0


def _norm_flops(matrix: Matrix) -> float:
    """Returns DoRA's products with ``W A^T`` and ``A A^T`` (`fsdpq.adapter.dora_product`)."""
    rank, rows, columns = matrix.rank, matrix.out_features, matrix.in_features
    return 2.0 * rank * (rows * columns + rank * columns + rank * rows)
