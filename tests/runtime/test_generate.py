"""generate, chat, stream_text and prompt lookup: the same answers on every way that is called exact."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

import lowbit
from lowbit.errors import InputError
from lowbit.kernels.pack import native
from lowbit.runtime.base import Engine
from lowbit.runtime.conversation import end_tokens
from lowbit.runtime.engine import Runtime
from lowbit.runtime.generate import generate
from lowbit.runtime.sampling import SamplingParams
from lowbit.runtime.speculation import PromptLookup

needs_native = pytest.mark.skipif(native is None, reason="the compiled kernels were not built")
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Engine:
    return lowbit.load(tiny)


@pytest.fixture(scope="module")
def general(tiny_float32: Path) -> Engine:
    return lowbit.load(tiny_float32, "float32")


@pytest.fixture(scope="module")
def chatty(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    path = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("chat") / "tiny"))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 77]}))
    return lowbit.load(path)


def tokens(engine: Engine, prompt: list[int], lookup: int = 0, **options: object) -> list[int]:
    return [o.token for o in engine.outputs(prompt, prompt_lookup=lookup, **options)]


def test_greedy_is_transformers_generate(general: Engine, tiny_float32: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_float32)
    for options in ({}, {"repetition_penalty": 1.5}):
        prompt = list(range(100, 130))
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=2, **options
        )
        assert tokens(general, prompt, max_new_tokens=30, ignore_eos=True, **options) == expected[0, 30:].tolist()


@needs_native
def test_generate_is_the_greedy_stream(engine: Engine) -> None:
    prompt = torch.randint(3, 4096, (1, 50), generator=torch.Generator().manual_seed(0))
    streamed = [int(t) for t in engine.stream(prompt, 40)]
    assert tokens(engine, prompt[0].tolist(), max_new_tokens=40, ignore_eos=True) == streamed


@needs_native
def test_what_the_cache_holds_changes_nothing(engine: Engine) -> None:
    """Repeated, extended, shortened and interleaved prompts, the token stream between them: the same answers."""
    a, b = list(range(50, 110)), list(range(50, 80)) + [9] * 30
    options = {"max_new_tokens": 20, "temperature": 1.0, "seed": 4, "ignore_eos": True, "logprobs": 2}
    fresh = {}
    for name, prompt in (("a", a), ("b", b), ("start", a[:20])):
        engine._held = []
        fresh[name] = list(engine.outputs(prompt, **options))
    for name, prompt in (("a", a), ("b", b), ("a", a), ("start", a[:20]), ("a", a)):
        assert list(engine.outputs(prompt, **options)) == fresh[name]
    pairs = zip(engine.outputs(a, **options), engine.outputs(b, **options), strict=True)
    assert [list(x) for x in zip(*pairs, strict=True)] == [fresh["a"], fresh["b"]]
    stream = engine.stream(torch.tensor([b]), 5)
    next(stream)
    assert list(engine.outputs(a, **options)) == fresh["a"]
    next(stream)
    assert list(engine.outputs(a, **options)) == fresh["a"]


@needs_native
def test_a_prompt_of_several_pieces_and_a_cache_that_grows(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    long = lowbit.load(make_llama(tmp_path / "long", max_position_embeddings=4096))
    prompt = torch.randint(3, 4096, (2500,), generator=torch.Generator().manual_seed(0)).tolist()
    short = tokens(long, prompt[:1100], max_new_tokens=5, ignore_eos=True)
    whole = tokens(long, prompt, max_new_tokens=5, ignore_eos=True)  # more than the cache was first made for
    assert tokens(long, prompt[:1100], max_new_tokens=5, ignore_eos=True) == short
    rows = long.logits(torch.tensor([[*prompt, *whole]]))[0, len(prompt) - 1 : -1]
    assert rows.argmax(-1).tolist() == whole


@needs_native
def test_prompt_lookup_is_exact(engine: Engine) -> None:
    """Random and repetitive texts, where guesses fail; greedy, penalized and drawn."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 4096, (40,), generator=generator).tolist(), [7, 8, 9, 10] * 10, [5] * 30]
    for prompt in prompts:
        for options in ({}, {"repetition_penalty": 1.3}, {"temperature": 0.5, "seed": 3, "logprobs": 1}):
            words = {"max_new_tokens": 60, "ignore_eos": True, **options}
            plain = list(engine.outputs(prompt, **words))
            for k in (1, 3, 10):
                assert list(engine.outputs(prompt, prompt_lookup=k, **words)) == plain


@pytest.mark.model
@needs_native
def test_prompt_lookup_on_the_demo_model_is_exact_and_saves_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    demo, calls = lowbit.load("demo"), []
    original = type(demo)._compute
    monkeypatch.setattr(type(demo), "_compute", lambda *a: calls.append(1) or original(*a))
    prompt = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n\nclass Point3:\n"
    for text in (prompt, prompt * 3, "import os\n"):
        plain = list(demo.outputs(text, max_new_tokens=120))
        for k in (2, 5, 16):
            calls.clear()
            assert list(demo.outputs(text, max_new_tokens=120, prompt_lookup=k)) == plain
            assert len(calls) < 0.6 * len(plain)


def test_prompt_lookup_through_transformers(general: Engine) -> None:
    prompt = [7, 8, 9, 10] * 8
    plain = tokens(general, prompt, max_new_tokens=40, ignore_eos=True)
    assert tokens(general, prompt, lookup=6, max_new_tokens=40, ignore_eos=True) == plain


def test_a_sliding_window_that_forgets_is_computed_anew(tmp_path: Path, tiny: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, max_position_embeddings=256, sliding_window=16, initializer_range=0.1,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny / name, tmp_path / name)
    mistral = lowbit.load(tmp_path, "float32")
    prompt = [7, 8, 9, 10] * 8
    plain = tokens(mistral, prompt, max_new_tokens=30, ignore_eos=True)
    assert tokens(mistral, prompt, lookup=4, max_new_tokens=30, ignore_eos=True) == plain


def test_the_lookup_proposes_what_followed_last_time() -> None:
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 2, 3])
    assert lookup.propose(3) == [5, 2, 3]  # the last time that 2, 3 stood there
    assert lookup.propose(1) == [5]
    assert lookup.propose(0) == []
    lookup.append(4)
    assert lookup.propose(2) == [9, 2]
    lookup.append(77)
    assert lookup.propose(2) == []
    assert PromptLookup([6, 6, 6]).propose(5) == [6] * 5  # a loop is guessed to go on


def test_stop_strings_and_tokens_end_the_text(general: Engine) -> None:
    prompt = "def f(x):\n"
    whole = list(general.outputs(prompt, max_new_tokens=30, ignore_eos=True))
    text = "".join(o.text for o in whole)
    assert whole[-1].finish == "length"
    word = text[len(text) // 2 : len(text) // 2 + 4]
    cut = list(general.outputs(prompt, max_new_tokens=30, ignore_eos=True, stop=[word]))
    assert "".join(o.text for o in cut) == text[: text.index(word)]
    assert cut[-1].finish == "stop"
    assert len(cut) < 30
    stopper = whole[4].token
    first = [o.token for o in whole].index(stopper)
    ended = list(general.outputs(prompt, max_new_tokens=30, stop_token_ids=[stopper], ignore_eos=True))
    assert [o.token for o in ended] == [o.token for o in whole][: first + 1]
    assert "".join(o.text for o in ended) == text[: len("".join(o.text for o in ended))]
    assert "".join(general.stream_text(prompt, max_new_tokens=30, ignore_eos=True)) == text
    assert general.generate(prompt, SamplingParams(max_new_tokens=30, ignore_eos=True)) == text


@needs_native
def test_chat_goes_through_the_models_template(chatty: Engine) -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert (
        chatty.chat_tokens(messages)
        == chatty.tokenizer("<s>user: hello</s>\n<s>assistant:", add_special_tokens=False)["input_ids"]
    )
    options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 5}
    answer = chatty.chat(messages, **options)
    assert answer == chatty.generate(chatty.chat_tokens(messages), **options)
    messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "more"}]
    assert isinstance(chatty.chat(messages, max_new_tokens=3), str)


@needs_native
def test_every_end_token_of_the_generation_config_ends(chatty: Engine) -> None:
    prompt = [5, 6, 7]
    free = tokens(chatty, prompt, max_new_tokens=200, temperature=3.0, seed=1, ignore_eos=True)
    assert end_tokens(chatty.checkpoint, chatty.tokenizer) == (2, 77)
    params = SamplingParams(max_new_tokens=200, temperature=3.0, seed=1)
    limited = list(generate(chatty, prompt, params, end=[free[10]], tokenizer=chatty.tokenizer))
    assert [o.token for o in limited] == free[: free.index(free[10]) + 1]
    assert limited[-1].finish == "stop"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "conversation is empty"),
        ([{"role": "user"}], "a message is"),
        (["hi"], "a message is"),
        ([{"role": "tool", "content": "x"}], "chat template refuses these messages: no tools here"),
    ],
)
def test_bad_conversations(chatty: Engine, messages: list[dict[str, str]], says: str) -> None:
    with pytest.raises(InputError, match=says):
        chatty.chat(messages)


@pytest.mark.parametrize("runtime", ["auto", "float32"])
def test_bad_prompts_are_refused_before_anything_runs(runtime: Runtime, tiny: Path) -> None:
    engine = lowbit.load(tiny, runtime)
    with pytest.raises(InputError, match="prompt is empty"):
        engine.generate("")
    with pytest.raises(InputError, match="prompt is empty"):
        engine.generate([])
    with pytest.raises(InputError, match="token 5000, but the model knows 0 to 4095"):
        engine.generate([5000])
    with pytest.raises(InputError, match=r"has 256 tokens and leaves no room .* the model's context of 256"):
        engine.generate([3] * 256)
    with pytest.raises(InputError, match="250 prompt tokens and 64 new ones exceed the model's context of 256"):
        engine.generate([3] * 250)
    with pytest.raises(InputError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="prompt_lookup is -1"):
        engine.generate("x", prompt_lookup=-1)
    with pytest.raises(InputError, match="Did you mean max_new_tokens"):
        engine.generate("x", max_tokens=3)
    filled = list(engine.outputs([3] * 250, max_new_tokens=None, ignore_eos=True))
    assert len(filled) == 6
