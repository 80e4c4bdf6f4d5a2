"""Writes docs/concepts/scaling.md and its picture: step time on 1 to 64 machines, by arithmetic.

All numbers come from `fsdpq.plan.time`; text between the tables is the page's own.
``tests/recipes/test_recipe_plans.py`` fails when the page is not what this script writes.
Torch-free; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fsdpq.launch.plan import resolve_for, shape_of
from fsdpq.plan.hardware.gpus import parse_gpus
from fsdpq.plan.hardware.machine import GIB, Machine
from fsdpq.plan.shape import ModelShape
from fsdpq.plan.time.estimate import step_links
from fsdpq.plan.time.rates import compute_time
from fsdpq.plan.time.traffic import Traffic, step_traffic
from fsdpq.plan.time.work import step_work
from fsdpq.plan.weights import plan_weights
from fsdpq.plan.workload import workload_of
from fsdpq.recipe.load import load_recipe
from fsdpq.recipe.root import Recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "concepts" / "scaling.md"
PICTURE = PAGE.with_suffix(".svg")
NODES = (1, 2, 4, 8, 16, 32, 64)
GBITS = (25, 100, 400)
GPUS = "8xH100"
MACHINE = Machine(gpus=parse_gpus(GPUS), ram_bytes=1024 * GIB, network_bandwidth=1e9)
HOP_S = 10e-6
"""One step of a ring that leaves the machine; assumed, not measured."""


@dataclass(frozen=True)
class Load:
    """What is trained.

    Attributes:
        name: for the tables.
        recipe: a shipped one.
        rows: of 2048 tokens that a GPU has at once.
        micro_batches: of a step; with more than one, gradients are reduced once.
    """

    name: str
    recipe: str
    rows: int
    micro_batches: int = 1

    def rows_on(self, nodes: int) -> int:
        """Returns the rows of a step."""
        return 8 * self.rows * self.micro_batches * nodes


LOADS = (
    Load("70B QLoRA", "llama-3-70b-qlora-8x24gb", 4),
    Load("7B QLoRA", "llama-2-7b-qlora-2x24gb", 4),
    Load("7B full", "llama-2-7b-full-2x80gb", 4),
    Load("7B full, accumulated", "llama-2-7b-full-2x80gb", 4, 8),
)
STRATEGIES = ("full_shard", "shard_grad_op", "hybrid_full_shard", "ddp")


@dataclass(frozen=True)
class Step:
    """A step on some machines.

    Attributes:
        traffic: of it.
        kernels_s: what a GPU computes, the optimizer's step apart.
        rest_s: of the optimizer.
        inside_s: transfers between GPUs, one after another.
        hops: steps of rings that leave the machine, one after another.
    """

    traffic: Traffic
    kernels_s: float
    rest_s: float
    inside_s: float
    hops: int

    def hidden_s(self, gbits: float) -> float:
        """Returns its seconds where all transfers run beside the computation."""
        network = self.traffic.network / (gbits / 8 * 1e9)
        return max(self.kernels_s, self.inside_s, network) + self.rest_s

    def exposed_s(self, gbits: float) -> float:
        """Returns its seconds where nothing does, with a latency for every hop."""
        network = self.traffic.network / (gbits / 8 * 1e9) + self.hops * HOP_S
        return self.kernels_s + self.inside_s + network + self.rest_s

    @property
    def needed_gbits(self) -> float:
        """What the network has to carry for a step to hide it."""
        return self.traffic.network / self.kernels_s * 8 / 1e9


@cache
def _loaded(load: Load) -> tuple[Recipe, ModelShape]:
    overrides = [
        "training.gradient_accumulation_steps=null",
        f"training.micro_batch_size={load.rows}",
        f"training.global_batch_size={load.rows_on(1)}",
        "data.seq_len=2048", "launch.nproc_per_node=8", "metrics.sinks=[jsonl]",
        "metrics.wandb.project=null",
    ]  # fmt: skip
    loaded = load_recipe(ROOT / "recipes" / f"{load.recipe}.yaml", overrides)
    recipe, _ = resolve_for(loaded.recipe, MACHINE)
    return recipe, shape_of(loaded)


@cache
def step(load: Load, strategy: str, nodes: int) -> Step:
    """Returns a step with as many rows a GPU on any number of machines."""
    recipe, shape = _loaded(load)
    rows = load.rows_on(nodes)
    recipe = recipe.model_copy(
        update={
            "launch": recipe.launch.model_copy(update={"nnodes": nodes}),
            "fsdp": recipe.fsdp.model_copy(
                update={"strategy": strategy, "no_sync": load.micro_batches > 1}
            ),
            "training": recipe.training.model_copy(update={"global_batch_size": rows}),
        }
    )
    weights, workload = plan_weights(recipe, shape), workload_of(recipe)
    gpu = parse_gpus(GPUS)[0]
    compute = compute_time(step_work(recipe, shape), recipe, shape, weights, workload, gpu)
    assert compute is not None
    links = step_links(recipe, shape, weights, MACHINE, gpu, free_ram_bytes=None)
    inside = sum(link.seconds or 0.0 for link in links if link.name != "network")
    traffic = step_traffic(recipe, shape, weights)
    hops = _hops(traffic, weights.num_shards, 8 * nodes // weights.num_shards)
    return Step(traffic, compute.kernels_s, compute.optimizer_s, inside, hops)


def _hops(traffic: Traffic, num_shards: int, num_copies: int) -> int:
    """Returns how many steps of rings that leave the machine come one after another."""
    in_shards = (traffic.num_gathers + traffic.num_reductions) * (num_shards - 1)
    sums = traffic.num_sums * 2 * (num_copies - 1)
    return (in_shards if num_shards > 8 else 0) + (sums if traffic.network else 0)


def efficiency(load: Load, strategy: str, nodes: int, gbits: float, *, hidden: bool) -> float:
    """Returns the tokens a second of a machine, as a share of those of one alone.

    That one uses full_shard, and hides its transfers.
    """
    alone, many = step(load, "full_shard", 1), step(load, strategy, nodes)
    return alone.hidden_s(gbits) / (many.hidden_s(gbits) if hidden else many.exposed_s(gbits))


def byte_table() -> Iterator[str]:
    """Yields what comes into a machine in a step, and what the network must carry to hide it."""
    yield _row(["", "strategy", *(f"{nodes} machines" for nodes in NODES[1:]), "hides from"])
    yield _row(["---"] * (len(NODES) + 2))
    for load in LOADS:
        for strategy in STRATEGIES:
            steps = [step(load, strategy, nodes) for nodes in NODES[1:]]
            cells = [f"{each.traffic.network / 1e9:.2f}" for each in steps]
            needed = max(each.needed_gbits for each in steps)
            yield _row([load.name, f"`{strategy}`", *cells, f"{needed:.0f} Gbit/s"])


def step_table() -> Iterator[str]:
    """Yields the efficiency of every strategy, network and number of machines."""
    yield _row(["", "strategy", "network", *(str(nodes) for nodes in NODES[1:])])
    yield _row(["---"] * (len(NODES) + 2))
    for load in LOADS:
        for strategy in STRATEGIES[:3]:
            for gbits in GBITS:
                cells = [_share(load, strategy, nodes, gbits) for nodes in NODES[1:]]
                yield _row([load.name, f"`{strategy}`", f"{gbits} Gbit/s", *cells])


def seconds_table() -> Iterator[str]:
    """Yields how long a step takes at 100 Gbit/s."""
    yield _row(["", "strategy", *(str(nodes) for nodes in NODES)])
    yield _row(["---"] * (len(NODES) + 2))
    for load in LOADS:
        for strategy in STRATEGIES[:3]:
            steps = [step(load, strategy, nodes) for nodes in NODES]
            cells = [f"{each.hidden_s(100):.2f} to {each.exposed_s(100):.2f}" for each in steps]
            yield _row([load.name, f"`{strategy}`", *cells])


def _share(load: Load, strategy: str, nodes: int, gbits: float) -> str:
    best = efficiency(load, strategy, nodes, gbits, hidden=True)
    worst = efficiency(load, strategy, nodes, gbits, hidden=False)
    return f"{100 * worst:.0f} to {100 * best:.0f}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


CURVES = (("hybrid_full_shard", "b"), ("full_shard", "a"))
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, GAP = 780, 330, 44, 20, 90, 50, 26
PANEL = (WIDTH - LEFT - RIGHT - (len(GBITS) - 1) * GAP) / len(GBITS)
STYLE = """\
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #4d5866; }
.title { font-size: 15px; font-weight: 600; fill: #1b2430; } .name { font-weight: 600; }
.back { fill: #fff; } .grid { stroke: #e3e7ec; }
.line { fill: none; stroke-width: 2.2; } .band { stroke-width: .8; fill-opacity: .16; }
.a { stroke: #2f6fde; } .b { stroke: #c2540a; }
.band.a { fill: #2f6fde; } .band.b { fill: #c2540a; }
@media (prefers-color-scheme: dark) {
  text { fill: #a9b4c2; } .title { fill: #e6eaf0; }
  .back { fill: #1b2129; } .grid { stroke: #2f3843; }
  .a { stroke: #7aa7ff; } .b { stroke: #ff9d57; }
  .band.a { fill: #7aa7ff; } .band.b { fill: #ff9d57; }
}"""


def picture() -> str:
    """Returns an SVG of the efficiency of 70B QLoRA, light and dark: a panel for each network."""
    title = "70B QLoRA: tokens a second of a machine, % of one machine alone"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{title}, by number of machines</title>",
        f"<style>{STYLE}</style>",
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text class="title" x="{LEFT}" y="28">{title}</text>',
    ]
    for place, (strategy, style) in enumerate(CURVES):
        x = LEFT + place * 190
        lines.append(f'<path class="line {style}" d="M{x} 48h26"/>')
        lines.append(f'<text x="{x + 34}" y="52">{strategy}</text>')
    key = "line: all transfers hidden; lower edge: none"
    lines.append(f'<text x="{WIDTH - RIGHT}" y="52" text-anchor="end">{key}</text>')
    for index, gbits in enumerate(GBITS):
        lines += _panel(LEFT + index * (PANEL + GAP), gbits, has_labels=index == 0)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(left: float, gbits: int, *, has_labels: bool) -> Iterator[str]:
    """Yields grid, bands and lines of one network."""
    yield f'<text class="name" x="{left:.1f}" y="{TOP - 10}">{gbits} Gbit/s a machine</text>'
    for percent in range(0, 101, 25):
        y = _y(percent / 100)
        yield f'<path class="grid" d="M{left:.1f} {y:.1f}h{PANEL:.1f}"/>'
        if has_labels:
            yield f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{percent}</text>'
    across = [left + index / (len(NODES) - 1) * PANEL for index in range(len(NODES))]
    for x, nodes in zip(across, NODES, strict=True):
        yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{nodes}</text>'
    middle = left + PANEL / 2
    yield f'<text x="{middle:.1f}" y="{HEIGHT - 12}" text-anchor="middle">machines</text>'
    for strategy, style in CURVES:
        best, worst = (
            [
                f"{x:.1f} {_y(efficiency(LOADS[0], strategy, nodes, gbits, hidden=hidden)):.1f}"
                for x, nodes in zip(across, NODES, strict=True)
            ]
            for hidden in (True, False)
        )
        yield f'<path class="band {style}" d="M{"L".join([*best, *reversed(worst)])}Z"/>'
        yield f'<path class="line {style}" d="M{"L".join(best)}"/>'


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


TABLES = {"bytes": byte_table, "seconds": seconds_table, "efficiency": step_table}


def with_tables(text: str) -> str:
    """Returns the page with every table between its marks as it is now."""
    for name, lines in TABLES.items():
        before, mark, after = text.partition(f"<!-- {name} -->\n")
        assert mark, name
        text = f"{before}{mark}" + "\n".join(lines()) + "\n" + after[after.index("<!-- end -->") :]
    return text


def main() -> None:
    """Writes the page and the picture."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
