"""What an answer says of log-probabilities, from made-up outputs."""

from typing import Any

from lowbit.runtime.answer import Output
from lowbit.runtime.sampling import Choice
from lowbit.serving.answers import Answering
from lowbit.serving.requests import TextRequest


class Letters:
    """Tokens are letters."""

    def decode(self, tokens: list[int], **_words: Any) -> str:
        return "".join(chr(97 + t) for t in tokens)


def test_the_end_of_the_text_has_no_log_probability() -> None:
    """An end token is no part of the answer, and the token before it is not told twice."""
    answering = Answering(TextRequest(prompt="a", stream=True, logprobs=1), "m", [0], Letters(), end=[25])
    told = []
    for output in (Output(1, "b", None, -0.5, ((1, -0.5),)), Output(25, "", "stop", -0.1, ((25, -0.1),))):
        answering.add(output, 0)
        piece = answering.piece(output)
        assert piece is not None
        told.append(piece["choices"][0]["logprobs"])
    assert [said and said["tokens"] for said in told] == [["b"], None]


def test_each_of_two_kinds_of_log_probabilities_has_as_many_as_it_asked_for() -> None:
    asked = TextRequest(prompt=[0, 1], max_tokens=0, echo=True, logprobs=1, prompt_logprobs=3)
    answering = Answering(asked, "m", [0, 1], Letters(), end=[25])
    assert asked.top == 3
    answering.expected([Choice(1, -2.0, ((2, -0.5), (3, -1.5), (1, -2.0)))])
    choice = answering.choice()
    assert choice["text"] == "ab"
    assert choice["logprobs"]["top_logprobs"] == [None, {"c": -0.5}]
    assert choice["prompt_logprobs"] == [None, {"2": {"logprob": -0.5}, "3": {"logprob": -1.5}, "1": {"logprob": -2.0}}]
