"""Rewards: from 0 to 1, of the right order, and refused where they are neither."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from lidit.config.align import RewardSettings
from lidit.datasets.scenes.generator import generate_scene, seeded_random
from lidit.datasets.scenes.shapes import vocabulary_for
from lidit.errors import InputError, JobError
from lidit.evals.rewards import vqa
from lidit.evals.rewards.base import rewards_of
from lidit.evals.rewards.opening import open_reward
from tests.helpers.rewards import brightness

SIZE = 32


def scenes(count: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """True pictures of pairs of shapes, and what the corpus knows of each."""
    rng, vocabulary = seeded_random("rewards"), vocabulary_for(SIZE, "simple")
    made = [generate_scene(rng, "color_attr", SIZE, "simple", vocabulary) for _ in range(count)]
    records = [{"prompt": "a scene", "geneval": scene.geneval("a scene")} for scene in made]
    return np.stack([scene.render() for scene in made]), records


def test_true_scenes_are_worth_one_and_others_nothing() -> None:
    pictures, records = scenes(6)
    reward = open_reward(RewardSettings())
    assert reward(pictures, records) == [1.0] * 6
    blank = np.full_like(pictures, 128)
    assert reward(blank, records) == [0.0] * 6


def test_partial_rewards_lie_between_wrong_and_half() -> None:
    pictures, records = scenes(12)
    partial = open_reward(RewardSettings(rule="partial"))
    # pictures of other scenes: some clauses hold
    given = partial(np.roll(pictures, 1, axis=0), records)
    assert partial(pictures, records) == [1.0] * 12
    assert {0.0, 0.25} <= set(given) <= {0.0, 0.25, 0.5, 1.0}


def test_samples_without_a_scene_are_refused() -> None:
    pictures, _ = scenes(1)
    with pytest.raises(InputError, match=r"'a cat' has no 'geneval'"):
        open_reward(RewardSettings())(pictures, [{"prompt": "a cat"}])


@pytest.mark.parametrize(
    ("given", "message"),
    [([0.5], "1 rewards for 2 pictures"), ([0.5, 1.5], "1.5 is not from 0 to 1"), ([0.5, -0.1],
                                                                                   "-0.1 is not"),
     ([float("nan"), 0], "nan is not"), (["good", 1], "a reward is no number")],
)  # fmt: skip
def test_what_is_no_reward_is_refused(given: list[Any], message: str) -> None:
    pictures, records = scenes(2)
    with pytest.raises(InputError, match=message):
        rewards_of(lambda *_: given, "reward.function: mine", pictures, records)


def test_a_function_is_imported_by_name() -> None:
    pictures, records = scenes(2)
    found = open_reward(
        RewardSettings(kind="function", function="tests.helpers.rewards:brightness")
    )
    assert list(found(pictures, records)) == brightness(pictures, records)
    for name, message in (("tests.helpers.rewards:absent", "cannot be imported"),
                          ("no_such_package:f", "cannot be"),
                          ("tests.helpers.rewards:np", "is no function")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            open_reward(RewardSettings(kind="function", function=name))


@pytest.mark.parametrize(
    "settings",
    [{"kind": "function"}, {"function": "a:b"}, {"kind": "function", "function": "a b"},
     {"kind": "vqa"},
     {"kind": "vqa", "url": "file:///etc", "model": "m"}, {"url": "http://h", "model": "m"},
     {"kind": "vqa", "url": "http://h", "model": "m", "question": "yes?"}],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RewardSettings(**settings)


# -- a model that is asked -------------------------------------------------------------------------


class Answers(HTTPServer):
    """A server of chat completions that says what it is told to; `asked` are the requests."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.status, self.choice = 200, {}  # type: ignore[var-annotated]


class Handler(BaseHTTPRequestHandler):
    server: Answers

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(
            {"path": self.path, "key": self.headers["Authorization"], **json.loads(body)}
        )
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [self.server.choice]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answers() -> Iterator[Answers]:
    server = Answers()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def asked_of(server: Answers) -> RewardSettings:
    return RewardSettings(
        kind="vqa", url=f"http://127.0.0.1:{server.server_port}/v1/", model="eyes"
    )


def test_a_model_is_shown_the_picture_and_asked(
    answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIDIT_VQA_KEY", "secret")
    likely = [{"token": " Yes", "logprob": np.log(0.6)}, {"token": "no", "logprob": np.log(0.2)}]
    answers.choice = {
        "logprobs": {"content": [{"top_logprobs": likely}]},
        "message": {"content": "Yes"},
    }
    pictures, _ = scenes(2)
    given = open_reward(asked_of(answers))(
        pictures, [{"prompt": "a red circle"}, {"prompt": "{prompt} x"}]
    )
    assert given == pytest.approx([0.75, 0.75])
    first = next(asked for asked in answers.asked if "a red circle" in str(asked))
    assert first["path"] == "/v1/chat/completions"
    assert first["key"] == "Bearer secret"
    shown, words = first["messages"][0]["content"]
    assert shown["image_url"]["url"].startswith("data:image/png;base64,")
    assert words["text"] == "Does this picture show exactly this: a red circle? Answer yes or no."


@pytest.mark.parametrize(("said", "worth"), [("Yes.", 1.0), ("no", 0.0)])
def test_words_alone_count_as_one_or_nothing(answers: Answers, said: str, worth: float) -> None:
    answers.choice = {"message": {"content": said}}
    pictures, _ = scenes(1)
    assert open_reward(asked_of(answers))(pictures, [{"prompt": "a"}]) == [worth]


def test_no_answer_is_no_reward(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa, "PAUSE", 0)
    reward, (pictures, _) = open_reward(asked_of(answers)), scenes(1)
    answers.choice = {"message": {"content": "maybe"}}
    with pytest.raises(JobError, match="neither yes nor no"):
        reward(pictures, [{"prompt": "a"}])
    answers.status = 503
    with pytest.raises(JobError, match=r"no answer after 3 tries \(503"):
        reward(pictures, [{"prompt": "a"}])
    assert len(answers.asked) == 1 + vqa.TRIES
    answers.status = 401
    with pytest.raises(InputError, match="refused the question \\(401"):
        reward(pictures, [{"prompt": "a"}])
