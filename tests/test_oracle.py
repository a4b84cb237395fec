import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from answers import Question
from oracle import NoisyOracle, Ranking, RewardOracle, RuleOracle

COLOR = Question("0", "a.mp4", "What color is the circle?", "red")
PLACE = Question("1", "a.mp4", "Where is it?", "top left")

unhurried = settings(deadline=None, max_examples=50)  # a busy machine is no failure
texts = st.sampled_from(
    ["red", "red ", "blue", "a red circle", "red or blue", "", "not red", "top left", "top"]
)
groups = st.lists(texts, min_size=2, max_size=6)


class FixedOracle:
    """Says what it is told; for the noise."""

    def __init__(self, ranks, ok=None):
        self.ranks = torch.tensor(ranks)
        self.ok = torch.tensor(ok if ok is not None else [True] * len(ranks))

    def rank(self, batch, texts):
        return Ranking(self.ranks, self.ok, ["" if ok else "judge down" for ok in self.ok])


def noisy(oracle, seed=0, **noise):
    return NoisyOracle(oracle, torch.Generator().manual_seed(seed), **noise)


def test_the_rule_oracle_ranks_by_grade_prompt_major():
    batch = [COLOR, PLACE]
    ranking = RuleOracle().rank(batch, ["blue", "red", "green", "top", "top left", "bottom left"])
    # PLACE grades: "top" 2 / 3, "top left" 1, "bottom left" 1 / 2
    assert ranking.ranks.tolist() == [[1, 0, 1], [1, 0, 2]]
    assert ranking.ranks.dtype == torch.int64
    assert ranking.ok.tolist() == [True, True] and ranking.ok.dtype == torch.bool
    assert len(ranking.notes) == 2


def test_equally_wrong_answers_tie_whatever_their_length_or_place():
    wrong = ["blue", "a very long wrong answer", "", "circle", "red or blue"]
    assert RuleOracle().rank([COLOR], wrong).ranks.tolist() == [[0] * 5]


def test_spans_with_the_same_iou_on_paper_tie():
    event = Question("0", "a.mp4", "When?", "", spans=((0.0, 1.0),))
    # 0.1, 0.2 and 0.7 to 0.8: IoU 0.1 each, though 0.8 - 0.7 is 0.10000000000000009 in floats
    ranking = RuleOracle().rank([event], ["0.1 to 0.2", "0.7 to 0.8", "0.3 to 0.4", "2 to 3"])
    assert ranking.ranks.tolist() == [[0, 0, 0, 3]]


@unhurried
@given(groups, st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_identical_texts_tie_under_any_noise(group, swap_prob, position_bias, seed):
    noise = {"swap_prob": swap_prob, "position_bias": position_bias, "seed": seed}
    for oracle in (RuleOracle(), noisy(RuleOracle(), **noise)):
        ranks = oracle.rank([COLOR], group).ranks[0].tolist()
        by_text = {}
        for text, place in zip(group, ranks, strict=True):
            assert by_text.setdefault(text.strip(), place) == place
        assert ranks == [sum(other < place for other in ranks) for place in ranks]  # competition ranks


@unhurried
@given(groups, st.randoms())
def test_permuting_candidates_permutes_ranks(group, random):
    order = random.sample(range(len(group)), len(group))
    ranks = RuleOracle().rank([COLOR], group).ranks[0]
    permuted = RuleOracle().rank([COLOR], [group[i] for i in order]).ranks[0]
    assert permuted.tolist() == ranks[order].tolist()


@unhurried
@given(groups)
def test_no_noise_changes_nothing(group):
    expected = RuleOracle().rank([COLOR, PLACE], group * 2)
    ranking = noisy(RuleOracle()).rank([COLOR, PLACE], group * 2)
    assert ranking.ranks.tolist() == expected.ranks.tolist()
    assert ranking.ok.tolist() == expected.ok.tolist()


def test_certain_swap_of_two_distinct_texts_reverses_them():
    ranking = noisy(RuleOracle(), swap_prob=1.0).rank([COLOR], ["red", "blue"])
    assert ranking.ranks.tolist() == [[1, 0]]
    # the three copies of the right answer go behind the one wrong answer together
    ranking = noisy(RuleOracle(), swap_prob=1.0).rank([COLOR], ["red", "blue", "red", " red"])
    assert ranking.ranks.tolist() == [[1, 0, 1, 1]]


def test_tied_texts_never_swap():
    ranking = noisy(FixedOracle([[0, 0, 0]]), swap_prob=1.0).rank([COLOR], ["a", "b", "c"])
    assert ranking.ranks.tolist() == [[0, 0, 0]]
    # a falls into the tie of b and c and no farther; one of those two rises, the other falls behind d
    ranks = noisy(FixedOracle([[0, 1, 1, 3]]), swap_prob=1.0).rank([COLOR], list("abcd")).ranks[0].tolist()
    assert ranks[0] == ranks[3] == 1 and sorted(ranks[1:3]) == [0, 3]


def test_swaps_come_as_often_as_asked():
    oracle = noisy(FixedOracle([[0, 1]] * 4000), swap_prob=0.3)
    swapped = oracle.rank([COLOR] * 4000, ["a", "b"] * 4000).ranks[:, 0].float().mean().item()
    assert swapped == pytest.approx(0.3, abs=0.03)  # 4 standard errors of sqrt(.3 * .7 / 4000)


def test_which_of_two_tied_texts_swaps_does_not_depend_on_their_place():
    oracle = noisy(FixedOracle([[0, 1, 1]] * 4000), swap_prob=1.0)
    ranks = oracle.rank([COLOR] * 4000, ["a", "b", "c"] * 4000).ranks
    assert (ranks[:, 1] == 0).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_position_bias_puts_the_first_text_and_its_copies_on_top():
    oracle = noisy(FixedOracle([[3, 0, 1, 3, 1]]), position_bias=1.0)
    assert oracle.rank([COLOR], ["a", "b", "c", "a", "d"]).ranks.tolist() == [[0, 2, 3, 0, 3]]


def test_position_bias_breaks_ties_as_such_a_judge_does():
    assert noisy(FixedOracle([[0, 0]]), position_bias=1.0).rank([COLOR], ["a", "b"]).ranks.tolist() == [
        [0, 1]
    ]


def test_failed_rankings_pass_through_untouched():
    oracle = noisy(FixedOracle([[1, 0], [1, 0]], ok=[False, True]), swap_prob=1.0)
    ranking = oracle.rank([COLOR, COLOR], ["a", "b", "a", "b"])
    assert ranking.ranks.tolist() == [[1, 0], [0, 1]]
    assert ranking.ok.tolist() == [False, True]
    assert ranking.notes == ["judge down", ""]


def test_restoring_the_generator_restores_the_noise():
    oracle = noisy(RuleOracle(), swap_prob=0.5, position_bias=0.5)
    group = ["red", "blue", "top", "red circle"] * 8
    state = oracle.generator.get_state()
    first, second = (oracle.rank([COLOR] * 8, group).ranks.tolist() for _ in range(2))
    oracle.generator.set_state(state)
    assert oracle.rank([COLOR] * 8, group).ranks.tolist() == first
    assert first != second


@pytest.mark.parametrize(("num_questions", "num_texts"), [(0, 0), (0, 4), (2, 0), (2, 2), (2, 3), (2, 5)])
def test_groups_that_are_too_small_or_uneven_are_refused(num_questions, num_texts):
    for oracle in (RuleOracle(), noisy(RuleOracle())):
        with pytest.raises(ValueError, match="G >= 2") as error:
            oracle.rank([COLOR] * num_questions, ["red"] * num_texts)
        assert "\n" not in str(error.value)


def test_the_dual_reward_ranks_by_its_sum_or_the_right_answer_first():
    question = Question("0", "a.mp4", "Which color?", "red", spans=((2.0, 8.0),))
    texts = ["red", "blue, 2 to 8 s", "red, 2 to 5 s", "blue", "red, from 2 to 5 seconds"]
    # sums 1, 1 + .1, 1 + .5 + .1, 0, 1.6; (right, overlap, form) puts a bare "red" above blue's span
    for by, ranks in (("sum", [3, 2, 0, 4, 0]), ("lexicographic", [2, 3, 0, 4, 0])):
        oracle = RewardOracle(by, (1.0, 1.0, 0.1))
        assert oracle.rank([question], texts).ranks.tolist() == [ranks]
        assert oracle.totals([question], texts).tolist() == [[1.0, 1.1, 1.6, 0.0, 1.6]]
