import json
from pathlib import Path

import pytest
import yaml

from lowbit.errors import InputError
from lowbit.recipe import Recipe, matches, read_recipe
from lowbit.scheme import Scheme

FULL = Recipe(
    scheme="w3a16-g64",
    method="gptq",
    calibration="prompts.jsonl",
    samples=32,
    seq_len=256,
    seed=3,
    ignore=("lm_head", "*.mlp.*"),
    override=(("layers.0.*", "w8a16"), ("down_proj", "none")),
    set=(("dampening_frac", "0.05"), ("desc_act", "false")),
)


@pytest.mark.parametrize("form", ["yaml", "json", "manifest"])
@pytest.mark.parametrize("recipe", [Recipe(), FULL], ids=["default", "full"])
def test_a_written_recipe_reads_back(tmp_path: Path, recipe: Recipe, form: str) -> None:
    words = recipe.to_dict()
    file = tmp_path / ("recipe.yaml" if form == "yaml" else "lowbit.json")
    if form == "yaml":
        file.write_text(yaml.safe_dump(words, sort_keys=False))
    else:
        file.write_text(json.dumps({"recipe": words, "layers": []} if form == "manifest" else words))
    assert Recipe(**read_recipe(file)) == recipe


def test_yaml_values_become_the_settings_words(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("scheme: w4a16\nset: {desc_act: no, dampening_frac: 0.05, sweeps: 3}\n")
    assert read_recipe(file)["set"] == (("desc_act", "false"), ("dampening_frac", "0.05"), ("sweeps", "3"))


def test_ignore_then_the_last_override_decide() -> None:
    recipe = Recipe(scheme="w4a16", ignore=("k_proj",), override=(("layers.0.*", "w8a16"), ("layers.0.mlp.*", "w3a16")))
    expected = {
        "model.layers.1.self_attn.q_proj": "w4a16",
        "model.layers.0.self_attn.q_proj": "w8a16",
        "model.layers.0.mlp.up_proj": "w3a16",
        "model.layers.0.self_attn.k_proj": "none",
        "model.layers.10.mlp.up_proj": "w4a16",
    }
    for name, scheme in expected.items():
        assert recipe.scheme_of(name) == Scheme.parse(scheme)


@pytest.mark.parametrize(
    ("pattern", "name", "hit"),
    [
        ("layers.0.*", "model.layers.0.mlp.up_proj", True),
        ("layers.0.*", "model.layers.10.mlp.up_proj", False),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("proj", "model.layers.0.mlp.up_proj", False),
        ("*", "lm_head", True),
        ("lm_head", "lm_head", True),
        ("LM_HEAD", "lm_head", False),
        ("layers.[01].*", "model.layers.1.mlp.up_proj", True),
    ],
)
def test_globs_match_the_name_or_a_tail_of_it(pattern: str, name: str, hit: bool) -> None:
    assert matches(pattern, name) is hit


def test_bad_words_of_a_recipe() -> None:
    with pytest.raises(InputError, match="unknown scheme 'w4a17'"):
        Recipe(scheme="w4a17")
    with pytest.raises(InputError, match="unknown scheme 'w9a16'"):
        Recipe(override=(("*", "w9a16"),))
    with pytest.raises(InputError, match="samples must be at least 1, got 0"):
        Recipe(samples=0)
    with pytest.raises(InputError, match="seq_len must be at least 1, got -5"):
        Recipe(seq_len=-5)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(InputError, match=r"seed.*-1"):
        Recipe(seed=-1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: w4a16", r"unknown word 'schema'\. Did you mean scheme"),
        ("- scheme", "a recipe is a mapping .*, got list"),
        ("", "a recipe is a mapping .*, got NoneType"),
        ("scheme: [", "not a readable recipe"),
        ("scheme: 4", r"scheme has the wrong type \(int: 4\)"),
        ("samples: many", "samples has the wrong type"),
        ("samples: 1.5", "samples has the wrong type"),
        ("samples: true", "samples has the wrong type"),
        ("ignore: lm_head", "ignore has the wrong type"),
        ("override: [a]", "override has the wrong type"),
        ("1: 2", "unknown word 1"),
        ("scheme: !!python/object/apply:os.getcwd []", "not a readable recipe"),
    ],
)
def test_recipe_files_at_fault(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(file)


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml: cannot be read"):
        read_recipe(tmp_path / "nowhere.yaml")
    (tmp_path / "x.yaml").write_bytes(b"scheme: \xff\xfe")
    with pytest.raises(InputError, match=r"x\.yaml: not a readable recipe"):
        read_recipe(tmp_path / "x.yaml")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match=r"x\.json: not a readable recipe"):
        read_recipe(tmp_path / "x.json")
