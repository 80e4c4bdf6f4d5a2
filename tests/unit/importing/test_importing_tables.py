"""The tables: what holds for every rule of every tool."""

import pytest

from fsdpq.cards.chat_templates import BUILT_IN_TEMPLATES
from fsdpq.importing import axolotl_datasets, known_keys, trl
from fsdpq.importing.accelerate import ACCELERATE
from fsdpq.importing.convert import TOOLS
from fsdpq.importing.draft import Rule, Table
from fsdpq.importing.sources import TEMPLATES
from fsdpq.recipe.describe import list_sections

TABLES = {name: tool.table for name, tool in TOOLS.items()} | {"accelerate": ACCELERATE}
DEAD = {"torchtune": {"fsdp"}}
"""Keys with a rule that the tool never reads: the rule says so, key by key."""


def _rules(table: Table) -> list[Rule]:
    inner = [rule for rule in table.rules.values() if isinstance(rule, Table)]
    inner += [rule.entries for rule in table.rules.values() if getattr(rule, "entries", None)]
    return [*table.rules.values(), *(rule for entry in inner for rule in _rules(entry))]


@pytest.mark.parametrize("tool", TABLES)
def test_every_rule_is_for_a_key_that_the_tool_reads(tool: str) -> None:
    table = TABLES[tool]
    assert set(table.rules) - set(table.known) == DEAD.get(tool, set())


def test_rules_of_entries_are_for_keys_that_the_tools_read() -> None:
    assert set(axolotl_datasets.DATASET.rules) <= set(known_keys.AXOLOTL_DATASET)
    assert set(trl.MIXTURE.rules) <= set(trl.MIXTURE.known)


def test_templates_of_other_tools_are_built_in_here() -> None:
    assert set(TEMPLATES.values()) <= set(BUILT_IN_TEMPLATES)


@pytest.mark.parametrize("tool", TABLES)
def test_every_target_is_a_key_of_a_recipe(tool: str) -> None:
    sections = list_sections()
    for rule in _rules(TABLES[tool]):
        for target in filter(None, getattr(rule, "target", "").split(", ")):
            section, *fields = target.split(".")
            known = {
                name for kind in sections[section].kinds.values() for name in kind.model_fields
            }
            assert not fields or fields[0] in known, target


def test_typos_of_published_configs_are_known_to_nobody() -> None:
    everything = known_keys.AXOLOTL | known_keys.TORCHTUNE | known_keys.HF_TRAINING
    assert everything.isdisjoint({"context_parapllel_size", "epohcs", "lora_rnak"})
