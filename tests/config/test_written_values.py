"""The value used is the value written: YAML 1.2's scalars, every key once, booleans apart from
numbers, one home.
"""

from pathlib import Path

import pytest

from lidit.config import DataSettings, Recipe
from lidit.config.ablation import AblationScenes
from lidit.config.codec import CodecLossSettings
from lidit.config.passwords import has_password
from lidit.config.settings import apply_overrides, load_yaml, validate
from lidit.config.shipped import load_recipe
from lidit.config.yaml_values import YamlError, read_yaml
from lidit.errors import InputError


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("off", "off"),
        ("No", "No"),
        ("y", "y"),
        ("TRUE", True),
        ("false", False),
        ("~", None),
        ("", None),
        ("0777", 777),
        ("-0042", -42),
        ("0o17", "0o17"),
        ("0x1F", "0x1F"),
        ("12:30:45", "12:30:45"),
        ("190:20:30.15", "190:20:30.15"),
        ("1999-12-31", "1999-12-31"),
        ("2001-12-14t21:59:43.10-05:00", "2001-12-14t21:59:43.10-05:00"),
        ("3e-4", 3e-4),
        (".5", 0.5),
        ("6.", 6.0),
        (".NaN", ".NaN"),
        ("-.inf", "-.inf"),
        ("1_000", "1_000"),
        ("=", "="),
        ('"7"', "7"),
        ("!!str 7", "7"),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(written: str, value: object) -> None:
    found = read_yaml(f"key: {written}\n")["key"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            "name: a\nmodel:\n  depth: 1\n  width: 2\n  depth: 3\n",
            5,
            "'depth' is there twice, first in line 3",
        ),
        ("- {a: 1}\n- {a: 1, 'a': 2}\n", 2, "'a' is there twice, first in line 2"),
        ("on: 1\nn: 2\non: 3\n", 3, "'on' is there twice, first in line 1"),
        ("a: !!int 5\n", 1, "the tag !!int is not read"),
        ("a: !!timestamp 2001-01-01\n", 1, "the tag !!timestamp"),
        ("a: 1\nb: !!python/name:os.system\n", 2, "the tag !!python/name:os.system"),
        ("a:\n  b: 1e400\n", 2, "larger than any number"),
        ("a: &x {b: *x}\n", 1, "an alias stands for what it is part of"),
        ('a: 1\nb: "\\0"\n', 2, "NUL"),
        ('a: "\\udfff"\n', 1, "no text"),
        ("? [1, 2]\n: 3\n", 1, "a key must be a word"),
        ("a: *b\n", 1, "undefined alias 'b'"),
        ("a: [1\n", 2, "expected ',' or ']'"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(
    text: str, line: int, said: str, tmp_path: Path
) -> None:
    with pytest.raises(YamlError) as caught:
        read_yaml(text)
    assert (caught.value.line, said in str(caught.value)) == (line, True), caught.value
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as refused:
        load_yaml(path)
    assert str(refused.value).startswith(f"{path}:{line}: not a readable YAML file: ")
    assert len(str(refused.value).splitlines()) == 1


def bomb(levels: int, width: int) -> str:
    lines = ["l0: &l0 [lol]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * width)}]" for n in range(1, levels + 1)]
    return "\n".join(lines)


def merges(levels: int, width: int) -> str:
    lines = ["m0: &m0 {a: 1}"]
    lines += [
        f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * width)}]}}" for n in range(1, levels + 1)
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(9, 10),
        merges(9, 10),
        f"a: &a {'x' * 50_000}\nb: [{', '.join(['*a'] * 500)}]",
        "a: " + "[" * 3000,
        "a: " + "{b: " * 3000,
        "- " * 3000,
        "\n".join(f"{' ' * n}k:" for n in range(3000)),
        "? a\n? b\n" + "- - " * 2000,
    ],
    ids=["aliases", "merges", "long text", "brackets", "braces", "dashes", "indented", "broken"],
)
def test_what_grows_without_end_ends_at_once(text: str) -> None:
    with pytest.raises(YamlError):
        read_yaml(text)
    with pytest.raises(InputError) as caught:
        apply_overrides({}, [f"train.steps={text}"])
    assert len(str(caught.value)) < 500
    assert len(str(caught.value).splitlines()) == 1


def test_an_aliased_section_is_a_copy() -> None:
    tree = read_yaml("base: &b {steps: 5, deep: {x: 1}}\na: *b\nc: {<<: *b, steps: 7}\n")
    assert tree["c"] == {"steps": 7, "deep": {"x": 1}}
    apply_overrides(tree, ["a.steps=9", "c.deep.x=2"])
    assert tree["base"] == {"steps": 5, "deep": {"x": 1}}
    assert tree["a"]["steps"] == 9


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\ncorpus: c\nencoders: [smollm2]\n")
    return str(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_size=true", "train.batch_size: must not be true or false"),
        (
            "train.optimizer.weight_decay=false",
            "train.optimizer.weight_decay: must not be true or false",
        ),
        (
            "sampler.guidance_interval=[false, 1]",
            "sampler.guidance_interval.0: must not be true or false",
        ),
        ("engine.zero_stage=true", "engine.zero_stage: must not be true or false"),
        (
            "engine.resources={gpu_kind: true}",
            "engine.resources.gpu_kind: must not be true or false",
        ),
        ("engine.compile=1", "engine.compile: must be true or false, found 1"),
        ("engine.compile=on", "engine.compile: must be true or false, found 'on'"),
        ("plan.mfu=.nan", "plan.mfu"),
        (
            "sampler.guidance_scale=Infinity",
            "sampler.guidance_scale: Input should be a finite number",
        ),
        ("train.log_every=0x10", "train.log_every"),
        (
            "train.log_every=9999999999999999999",
            "train.log_every: Input should be less than or equal to 9223372036854",
        ),
        (
            "data.seed=18446744073709551616",
            "data.seed: Input should be less than or equal to 18446744073709551615",
        ),
        ("evaluate.seed=-1", "evaluate.seed: Input should be greater than or equal to 0"),
        ("name=2024", 'name: must be text: in quotes, such as name: "2024", found 2024'),
        ("corpus=1.5", 'corpus: must be text: in quotes, such as corpus: "1.5"'),
        ("model={depth: 1, depth: 2}", "'depth' is there twice"),
    ],
)
def test_an_override_is_read_as_a_file_is(recipe: str, override: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(recipe, [override])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_values_that_are_what_they_say(recipe: str) -> None:
    found = load_recipe(
        recipe,
        ["name=2024-01-01", "train.steps=2e3", "engine.compile=true",
         "data.seed=18446744073709551615",
         "train.optimizer.betas=[0, 1]"],
    )  # fmt: skip
    assert found.name == "2024-01-01"
    assert found.train.steps == 2000
    assert found.engine.compile is True
    assert found.data.seed == 2**64 - 1
    assert found.train.optimizer.betas == (0.0, 1.0)
    assert AblationScenes(seed=2**64 - 1).seed == 2**64 - 1


@pytest.mark.parametrize("text", ["a\ud800b", "a\0b", "x" * 100_001])
def test_sample_prompts_pass_the_checks_of_captions(text: str) -> None:
    tree = {
        "name": "r",
        "corpus": "c",
        "encoders": [{"name": "e", "model": "m"}],
        "train": {"sample_prompts": [text]},
    }
    with pytest.raises(ValueError, match=r"prompt"):
        Recipe.model_validate(tree)
    tree["train"] = {"sample_prompts": ["x" * 100_000, "ein Würfel 一个"]}
    assert len(Recipe.model_validate(tree).train.sample_prompts) == 2


def test_every_place_is_in_the_same_home(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    found = load_recipe(
        recipe,
        ["output=~/runs", "corpus=~/c", "sources=[~/a, 's3://b/~/c', 'file://~/d']",
         "encoders.0.model=~/llm",
         "codec={name: x, model: ~/vae}", "train.init_from=~/m", "engine.nvme_path=~/n",
         "ingest.class_names=~/k.txt",
         "tracking.uri='sqlite:///~/m.db'"],
    )  # fmt: skip
    home = str(tmp_path)
    assert found.run_folder == tmp_path / "runs" / "r"
    assert found.corpus == f"{home}/c"
    assert found.sources == (f"{home}/a", "s3://b/~/c", f"file://{home}/d")
    assert found.encoders[0].model == f"{home}/llm"
    assert (found.codec.model, found.train.init_from) == (f"{home}/vae", f"{home}/m")
    assert (found.engine.nvme_path, found.ingest.class_names) == (f"{home}/n", f"{home}/k.txt")
    assert found.tracking.uri == f"sqlite:///{home}/m.db"
    assert (
        CodecLossSettings(perceptual_weight=1, perceptual_model="~/v").perceptual_model
        == f"{home}/v"
    )
    (tmp_path / "e.yaml").write_text("name: own\nmodel: here\n")
    assert load_recipe(recipe, ["encoders=[~/e.yaml]"]).encoders[0].name == "own"
    with pytest.raises(InputError, match="'~nobody-at-all' is nobody's home folder"):
        load_recipe(recipe, ["output=~nobody-at-all/runs"])


WITH_PASSWORD = [
    "https://me:secret@host/x",
    "https://ghp_TOKEN@github.com/x",
    "HTTPS://t@host",
    "postgresql://me:se cret@host/db",
    "postgresql://me:se'cret@host/db",
    "postgresql://me:se/cret@host/db",
    "mysql://me%3Asecret@host/db",
    "redis://:secret@host:6379/0",
    "https://host/x?password=secret",
    "https://host/?a=1&access_token=t",
    "jdbc:postgresql://host/db?user=me;password=secret",
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=0f",
    "https://a.blob.core.windows.net/c?sv=1&sig=x",
]
WITHOUT_PASSWORD = [
    "http://127.0.0.1:8265",
    "http://host:5000/model@revision",
    "postgresql://me@host/db",
    "ssh://git@host/x",
    "https://host/?page=2&design=3&keyword=a",
    "s3://bucket/a:b",
    "see https://host: ask me@host",
    "a red: circle @ home",
]


@pytest.mark.parametrize("text", WITH_PASSWORD)
def test_a_password_is_seen_in_every_form_of_url_and_never_repeated(text: str, recipe: str) -> None:
    assert has_password(text)
    for override in (f'corpus="{text}"', f'sources=["{text}"]',
                     f'engine.label_selector={{a: "{text}"}}',
                     f'encoders={{a: "{text}"}}', f'train.steps.deep="{text}"',
                     f'name: x="{text}'):  # fmt: skip
        with pytest.raises(InputError) as caught:
            load_recipe(recipe, [override])
        assert text not in str(caught.value)
        assert "cret" not in str(caught.value)


@pytest.mark.parametrize("text", WITHOUT_PASSWORD)
def test_other_urls_have_none(text: str) -> None:
    assert not has_password(text)


def test_many_mistakes_are_counted() -> None:
    tree = {
        "name": "r",
        "corpus": "c",
        "encoders": [{"name": "e", "model": "m"}],
        "sources": [[]] * 400,
    }
    with pytest.raises(InputError) as caught:
        validate(Recipe, tree, "r.yaml")
    assert len(str(caught.value).splitlines()) == 11
    assert str(caught.value).endswith("r.yaml: and 390 mistakes more")
    assert DataSettings().seed == 0
