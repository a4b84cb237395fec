import itertools
import math
import random
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_rank import ranks_from_scores
from oracle import (
    FunctionOracle,
    Ranking,
    RewardOracle,
    RuleOracle,
    competition_ranks,
    load_function,
    weighed,
)
from oracles import combine, feedback
from oracles.combine import (
    AnchoredOracle,
    NoisyOracle,
    PermutedOracle,
    consensus,
    kemeny,
    kendall_w,
    tie_disputed,
)
from oracles.feedback import feedback_means, feedback_sums, kendall_tau, ndcg_agreement
from plumbing.options import BadInput
from rollout import Completions
from videoqa.answers import Question

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
    ranking = RuleOracle().rank(batch, [["blue", "red", "green"], ["top", "top left", "bottom left"]])
    # PLACE grades: "top" 2 / 3, "top left" 1, "bottom left" 1 / 2
    assert ranking.ranks.tolist() == [[1, 0, 1], [1, 0, 2]]
    assert ranking.ranks.dtype == torch.int64
    assert ranking.ok.tolist() == [True, True] and ranking.ok.dtype == torch.bool
    assert len(ranking.notes) == 2


def test_equally_wrong_answers_tie_whatever_their_length_or_place():
    wrong = ["blue", "a very long wrong answer", "", "circle", "red or blue"]
    assert RuleOracle().rank([COLOR], [wrong]).ranks.tolist() == [[0] * 5]


def test_spans_with_the_same_iou_on_paper_tie():
    event = Question("0", "a.mp4", "When?", "", spans=((0.0, 1.0),))
    # 0.1, 0.2 and 0.7 to 0.8: IoU 0.1 each, though 0.8 - 0.7 is 0.10000000000000009 in floats
    ranking = RuleOracle().rank([event], [["0.1 to 0.2", "0.7 to 0.8", "0.3 to 0.4", "2 to 3"]])
    assert ranking.ranks.tolist() == [[0, 0, 0, 3]]


@unhurried
@given(groups, st.floats(0, 1), st.floats(0, 1), st.integers(0, 9))
def test_identical_texts_tie_under_any_noise(group, swap_prob, position_bias, seed):
    noise = {"swap_prob": swap_prob, "position_bias": position_bias, "seed": seed}
    for oracle in (RuleOracle(), noisy(RuleOracle(), **noise)):
        ranks = oracle.rank([COLOR], [group]).ranks[0].tolist()
        by_text = {}
        for text, place in zip(group, ranks, strict=True):
            assert by_text.setdefault(text.strip(), place) == place
        assert ranks == [sum(other < place for other in ranks) for place in ranks]  # competition ranks


@unhurried
@given(groups, st.randoms())
def test_permuting_candidates_permutes_ranks(group, random):
    order = random.sample(range(len(group)), len(group))
    ranks = RuleOracle().rank([COLOR], [group]).ranks[0]
    permuted = RuleOracle().rank([COLOR], [[group[i] for i in order]]).ranks[0]
    assert permuted.tolist() == ranks[order].tolist()


@unhurried
@given(groups)
def test_no_noise_changes_nothing(group):
    expected = RuleOracle().rank([COLOR, PLACE], [group] * 2)
    ranking = noisy(RuleOracle()).rank([COLOR, PLACE], [group] * 2)
    assert ranking.ranks.tolist() == expected.ranks.tolist()
    assert ranking.ok.tolist() == expected.ok.tolist()


def test_certain_swap_of_two_distinct_texts_reverses_them():
    ranking = noisy(RuleOracle(), swap_prob=1.0).rank([COLOR], [["red", "blue"]])
    assert ranking.ranks.tolist() == [[1, 0]]
    # the three copies of the right answer go behind the one wrong answer together
    ranking = noisy(RuleOracle(), swap_prob=1.0).rank([COLOR], [["red", "blue", "red", " red"]])
    assert ranking.ranks.tolist() == [[1, 0, 1, 1]]


def test_tied_texts_never_swap():
    ranking = noisy(FixedOracle([[0, 0, 0]]), swap_prob=1.0).rank([COLOR], [["a", "b", "c"]])
    assert ranking.ranks.tolist() == [[0, 0, 0]]
    # a falls into the tie of b and c and no farther; one of those two rises, the other falls behind d
    ranks = noisy(FixedOracle([[0, 1, 1, 3]]), swap_prob=1.0).rank([COLOR], [list("abcd")]).ranks[0].tolist()
    assert ranks[0] == ranks[3] == 1 and sorted(ranks[1:3]) == [0, 3]


def test_swaps_come_as_often_as_asked():
    oracle = noisy(FixedOracle([[0, 1]] * 4000), swap_prob=0.3)
    swapped = oracle.rank([COLOR] * 4000, [["a", "b"]] * 4000).ranks[:, 0].float().mean().item()
    assert swapped == pytest.approx(0.3, abs=0.03)  # 4 standard errors of sqrt(.3 * .7 / 4000)


def test_which_of_two_tied_texts_swaps_does_not_depend_on_their_place():
    oracle = noisy(FixedOracle([[0, 1, 1]] * 4000), swap_prob=1.0)
    ranks = oracle.rank([COLOR] * 4000, [["a", "b", "c"]] * 4000).ranks
    assert (ranks[:, 1] == 0).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_position_bias_puts_the_first_text_and_its_copies_on_top():
    oracle = noisy(FixedOracle([[3, 0, 1, 3, 1]]), position_bias=1.0)
    assert oracle.rank([COLOR], [["a", "b", "c", "a", "d"]]).ranks.tolist() == [[0, 2, 3, 0, 3]]


def test_position_bias_breaks_ties_as_such_a_judge_does():
    assert noisy(FixedOracle([[0, 0]]), position_bias=1.0).rank([COLOR], [["a", "b"]]).ranks.tolist() == [
        [0, 1]
    ]


def test_failed_rankings_pass_through_untouched():
    oracle = noisy(FixedOracle([[1, 0], [1, 0]], ok=[False, True]), swap_prob=1.0)
    ranking = oracle.rank([COLOR, COLOR], [["a", "b"], ["a", "b"]])
    assert ranking.ranks.tolist() == [[1, 0], [0, 1]]
    assert ranking.ok.tolist() == [False, True]
    assert ranking.notes == ["judge down", ""]


def test_restoring_the_generator_restores_the_noise():
    oracle = noisy(RuleOracle(), swap_prob=0.5, position_bias=0.5)
    groups = [["red", "blue", "top", "red circle"]] * 8
    state = oracle.generator.get_state()
    first, second = (oracle.rank([COLOR] * 8, groups).ranks.tolist() for _ in range(2))
    oracle.generator.set_state(state)
    assert oracle.rank([COLOR] * 8, groups).ranks.tolist() == first
    assert first != second


@pytest.mark.parametrize(
    ("num_questions", "sizes"), [(0, []), (0, [2]), (2, []), (2, [2]), (1, [1]), (2, [2, 3])]
)
def test_groups_that_are_too_small_or_uneven_are_refused(num_questions, sizes):
    oracles = [RuleOracle(), noisy(RuleOracle()), PermutedOracle(RuleOracle(), 2, "off", 0)]
    oracles += [AnchoredOracle(RuleOracle(), True, True), combine.DuelOracle(RuleOracle(), "pairs", 0)]
    for oracle in oracles:
        with pytest.raises(ValueError, match="G >= 2") as error:
            oracle.rank([COLOR] * num_questions, [["red"] * size for size in sizes])
        assert "\n" not in str(error.value)


def test_the_dual_reward_ranks_by_its_sum_or_the_right_answer_first():
    question = Question("0", "a.mp4", "Which color?", "red", spans=((2.0, 8.0),))
    texts = ["red", "blue, 2 to 8 s", "red, 2 to 5 s", "blue", "red, from 2 to 5 seconds"]
    # sums 1, 1 + .1, 1 + .5 + .1, 0, 1.6; (right, overlap, form) puts a bare "red" above blue's span
    for by, ranks in (("sum", [3, 2, 0, 4, 0]), ("lexicographic", [2, 3, 0, 4, 0])):
        oracle = RewardOracle(by, (1.0, 1.0, 0.1))
        ranking = oracle.rank([question], [texts])
        assert ranking.ranks.tolist() == [ranks]
        assert ranking.scores.tolist() == [[1.0, 1.1, 1.6, 0.0, 1.6]]


# ---- a user's own function


def test_a_function_in_a_file_outside_the_repository_is_an_oracle(tmp_path, monkeypatch):
    (tmp_path / "own_judge.py").write_text(
        "def shortest(question, texts, *, video, reference):\n"
        "    assert (question, video, reference) == ('What color is the circle?', 'a.mp4', 'red')\n"
        "    return [sum(len(other) < len(text) for other in texts) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    oracle = FunctionOracle(load_function("own_judge:shortest"))
    ranking = oracle.rank([COLOR], [["bb", "a", "ccc", " a ", "dd"]])
    assert ranking.ranks.tolist() == [[2, 0, 4, 0, 2]] and ranking.ok.tolist() == [True]


def test_a_function_that_leaves_the_program_or_spoils_its_list_fails_its_group():
    for function in (lambda question, texts, **_: sys.exit(3), lambda question, texts, **_: texts.clear()):
        ranking = FunctionOracle(function).rank([COLOR], [["a", "b"]])
        assert ranking.ok.tolist() == [False] and ranking.notes[0].startswith("function: ")


def test_a_function_that_takes_an_item_is_given_the_whole_question():
    seen = []
    oracle = FunctionOracle(lambda question, texts, *, item, **_: seen.append(item) or [0, 1])
    assert oracle.rank([PLACE], [["a", "b"]]).ranks.tolist() == [[0, 1]] and seen == [PLACE]


@pytest.mark.parametrize(
    ("returns", "words"),
    [([0], "1 ranks for 2 texts"), ([1, 2], "no competition ranks"), ([0.0, 1.0], "TypeError"),
     (None, "TypeError")],
)  # fmt: skip
def test_what_a_function_gets_wrong_fails_its_group_alone_with_the_cause(returns, words):
    oracle = FunctionOracle(lambda question, texts, **_: returns if "bad" in texts else [0, 1])
    groups = [["bad", "x"], ["good", "x"]]
    ranking = oracle.rank([COLOR, PLACE], groups)
    assert ranking.ok.tolist() == [False, True] and ranking.ranks[1].tolist() == [0, 1]
    assert ranking.notes[0].startswith("function: ") and words in ranking.notes[0]
    numbers = feedback_means(feedback_sums(groups, ranking))
    assert numbers["failed_by_cause"] == {"function": 1}


@pytest.mark.parametrize(
    "spec", ["no_such_module:f", "json:no_such_function", "json:decoder", "asyncio:open_connection"]
)
def test_a_function_that_is_not_there_is_one_line(spec):
    with pytest.raises(BadInput, match=f"--oracle {spec}: ") as error:
        load_function(spec)
    assert "\n" not in str(error.value)


# ---- anchor and canary


def test_behind_the_anchor_no_advantage_is_positive_and_before_it_nothing_changes():
    batch, groups = [COLOR, PLACE], [["blue", "green", "green"], ["top left", "nowhere", "top"]]
    ranking = AnchoredOracle(FixedOracle([[1, 2, 2, 0], [0, 2, 2, 0]]), True, False).rank(batch, groups)
    assert ranking.ranks.tolist() == [[0, 1, 1], [0, 1, 1]]
    assert ranking.below_anchor.tolist() == [[True] * 3, [False, True, True]]
    advantages = torch.tensor([[0.6, -0.3, -0.3], [0.6, -0.3, -0.3]])
    assert weighed(advantages, ranking).tolist() == torch.tensor(
        [[0, -0.3, -0.3], [0.6, -0.3, -0.3]]
    ).tolist()  # fmt: skip


def test_the_anchored_rule_oracle_needs_no_anchor():
    batch, groups = [COLOR, PLACE], [["blue", "red", "green"], ["top", "top left", "bottom left"]]
    plain = RuleOracle().rank(batch, groups)
    ranking = AnchoredOracle(RuleOracle(), True, True).rank(batch, groups)
    assert ranking.ranks.tolist() == plain.ranks.tolist()
    assert ranking.below_anchor.tolist() == (plain.ranks > 0).tolist()
    assert feedback_means(feedback_sums(groups, ranking))["canary_error"] == 0


def test_the_canary_measures_a_judges_error_rate():
    oracle = AnchoredOracle(
        FixedOracle([[0, 1, 3, 2], [0, 1, 2, 3], [0, 1, 2, 2], [3, 2, 0, 1]]), False, True
    )
    ranking = oracle.rank([COLOR, PLACE, COLOR, PLACE], [["a", "b"]] * 4)
    assert feedback_means(feedback_sums([["a", "b"]] * 4, ranking))["canary_error"] == 0.5
    assert ranking.below_anchor is None


def test_a_known_bad_answer_is_really_bad():
    quiz = Question("2", "a.mp4", "Which?", "red", options=("red", "blue"), answer_index=0)
    assert combine.wrong_answer([quiz, COLOR], 0) == "blue"
    assert combine.wrong_answer([COLOR, COLOR, PLACE], 0) == "top left"
    assert combine.wrong_answer([COLOR, COLOR], 0) == "I do not know."


def test_agreement_scales_a_groups_advantages():
    ranking = Ranking(torch.tensor([[0, 1], [0, 1]]), agreement=torch.tensor([1.0, 0.25]))
    assert weighed(torch.tensor([[0.5, -0.5], [0.5, -0.5]]), ranking).tolist() == [
        [0.5, -0.5],
        [0.125, -0.125],
    ]


# ---- one order out of several


weak_orders = st.integers(2, 4).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(0, n - 1), min_size=n, max_size=n).map(competition_ranks), min_size=1, max_size=5
    )
)


def distance(order, vote):
    pairs = itertools.combinations(range(len(vote)), 2)
    sign = lambda v, i, j: (v[i] > v[j]) - (v[i] < v[j])  # noqa: E731
    return sum(abs(sign(order, i, j) - sign(vote, i, j)) for i, j in pairs)


@unhurried
@given(weak_orders)
def test_kemeny_is_the_mean_of_all_orders_at_the_least_distance(votes):
    n = len(votes[0])
    orders = {tuple(competition_ranks(list(x))) for x in itertools.product(range(n), repeat=n)}
    costs = {order: sum(distance(order, vote) for vote in votes) for order in orders}
    best = [order for order in orders if costs[order] == min(costs.values())]
    assert kemeny(votes) == competition_ranks([sum(column) for column in zip(*best, strict=True)])
    if len(best) == 1:
        assert kemeny(votes) == list(best[0])


@unhurried
@given(weak_orders, st.randoms())
def test_consensus_is_neutral_and_keeps_what_all_agree_on(votes, random):
    n = len(votes[0])
    order = random.sample(range(n), n)
    place, moved = consensus(votes), consensus([[vote[i] for i in order] for vote in votes])
    assert moved == [place[i] for i in order]
    assert consensus([votes[0]] * 3) == votes[0]
    tied = tie_disputed(place, votes)
    for i, j in itertools.combinations(range(n), 2):
        if len({(v[i] > v[j]) - (v[i] < v[j]) for v in votes}) > 1:
            assert tied[i] == tied[j]


def test_a_majority_beats_a_biased_vote_a_cycle_ties_and_above_seven_it_is_borda():
    assert kemeny([[0, 1, 2], [0, 1, 2], [2, 0, 1]]) == [0, 1, 2]
    assert kemeny([[0, 1, 2], [2, 0, 1], [1, 2, 0]]) == [0, 0, 0]
    assert kemeny([[0, 1], [1, 0]]) == [0, 0]
    up = list(range(8))
    assert consensus([up, up, up[::-1]]) == up
    assert consensus([up, up[::-1]]) == [0] * 8


def test_kendalls_w_by_hand():
    assert kendall_w([[0, 1, 2], [0, 1, 2]]) == 1.0
    assert kendall_w([[0, 1, 2], [2, 1, 0]]) == 0.0
    # sums of ranks 3, 3, 6 + ... : ranks 012, 012, 102: sums 1, 2, 6, mean 3, S = 14, W = 12 * 14 / (9 * 24)
    assert kendall_w([[0, 1, 2], [0, 1, 2], [1, 0, 2]]) == pytest.approx(12 * 14 / 216)
    # ties: mid-ranks .5 .5 2 twice: S = 2 * ... = (1 - 2)^2 * 2 + (4 - 2)^2 = 6; 72 / (4 * 24 - 2 * 12)
    assert kendall_w([[0, 0, 2], [0, 0, 2]]) == pytest.approx(1.0)
    assert kendall_w([[0, 0, 0], [0, 0, 0]]) == 1.0


# ---- permutations of any oracle


def test_permutations_take_a_position_bias_out_of_any_oracle_and_measure_it():
    """The bias puts the first of five on top in 3 of 10 cases; pairs that come out wrong, at k = 1 and 5."""
    chance, words = random.Random(0), ["red", "blue", "green", "not red", "circle"]
    asked = [COLOR] * 200, [chance.sample(words, 5) for _ in range(200)]
    truth, wrong = RuleOracle().rank(*asked).ranks, {}
    for k in (1, 5):
        ranking = PermutedOracle(noisy(RuleOracle(), position_bias=0.3), k, "scale", 0).rank(*asked)
        signs = [(r[:, :, None] - r[:, None, :]).sign() for r in (ranking.ranks, truth)]
        wrong[k] = (signs[0] - signs[1]).abs().sum().item()
        numbers = feedback_means(feedback_sums(asked[1], ranking))
        assert numbers["position_bias"] > 0.1 and 0 < numbers["kendall_w"] <= 1 and ranking.ok.all()
    assert wrong[5] <= 0.2 * wrong[1]
    assert ranking.agreement.min() < 1  # and it says how much they disagree
    fair = PermutedOracle(RuleOracle(), 5, "scale", 0).rank(*asked)
    assert torch.equal(fair.ranks, truth) and (fair.agreement == 1).all()


@unhurried
@given(groups, st.integers(0, 9), st.sampled_from(["off", "tie"]))
def test_permuted_rankings_tie_identical_texts(group, seed, agreement):
    oracle = PermutedOracle(noisy(RuleOracle(), seed, swap_prob=0.5, position_bias=0.3), 3, agreement, seed)
    ranks = oracle.rank([COLOR], [group]).ranks[0].tolist()
    by_text = {}
    for text, place in zip(group, ranks, strict=True):
        assert by_text.setdefault(text.strip(), place) == place
    assert ranks == competition_ranks(ranks)


def test_a_group_keeps_the_permutations_that_did_not_fail_and_fails_where_all_do():
    """Of a > b twice one order fails: the other is kept. Of the second group both fail."""
    down = PermutedOracle(FixedOracle([[0, 1]] * 4, [True, False, False, False]), 2, "off", 0)
    ranking = down.rank([COLOR, PLACE], [["a", "b"]] * 2)
    assert ranking.ok.tolist() == [True, False] and ranking.notes == ["judge down"] * 2
    assert sorted(ranking.ranks[0].tolist()) == [0, 1]
    numbers = feedback_means(feedback_sums([["a", "b"]] * 2, ranking))
    assert numbers["lost_rankings"] == 1 and numbers["position_pairs"] == 1 and numbers["position_bias"] == 1


def test_all_orders_of_all_groups_are_asked_in_one_batch_and_only_distinct_texts_are_ordered():
    batches = []

    class Watching(RuleOracle):
        def rank(self, batch, texts):
            batches.append(texts)
            return super().rank(batch, texts)

    groups = [["red", "blue", " red", "green"], ["top", "top", "top ", "top"]]
    ranking = PermutedOracle(Watching(), 3, "off", 0).rank([COLOR, PLACE], groups)
    assert ranking.ranks.tolist() == [[0, 2, 0, 2], [0, 0, 0, 0]]
    assert len(batches) == 1 and len(batches[0]) == 4  # three orders of three texts, one order of one text
    assert all(sorted(set(group)) == ["blue", "green", "red"] for group in batches[0][:3])
    assert len({tuple(group) for group in batches[0][:3]}) == 3  # each text stands first once
    again = PermutedOracle(Watching(), 3, "off", 0).rank([COLOR, PLACE], [group[::-1] for group in groups])
    assert batches[1] == batches[0] and again.ranks[0].tolist() == [2, 0, 2, 0]


# ---- tripwires


def test_tripwires_see_length_openings_and_refusals():
    said = [["I cannot tell from the video", "it is red"], ["it is red and very large", "it is red"]]
    longer_is_better = Ranking(torch.tensor([[0, 1], [0, 1]]), torch.tensor([True, True]), ["", ""])
    numbers = feedback_means(feedback_sums(said, longer_is_better))
    assert numbers["length_tau"] == 1.0 and numbers["refusals"] == 0.25
    assert numbers["repeated_openings"] == 0.75 and numbers["failed_by_cause"] == {}
    shorter = Ranking(torch.tensor([[1, 0], [1, 0]]), torch.tensor([True, False]), ["", "cut: words"])
    numbers = feedback_means(feedback_sums(said, shorter))
    assert numbers["length_tau"] == -1.0 and numbers["failed_by_cause"] == {"cut": 1}


def test_counts_of_joined_batches_add_up_in_the_order_in_which_they_came():
    """The order of a step's metrics is that of these names; a set's differs from one start to the next."""
    names = [f"reward_{x}" for x in "discrete continuous format".split()]
    parts = [Ranking(torch.tensor([[0, 1]]), sums=dict.fromkeys(names, i)) for i in (1, 2)]
    assert list(Ranking.joined(parts).sums.items()) == [(name, 3) for name in names]


# ---- duels of two


class Counting(RuleOracle):
    """The rule oracle, and how many groups each batch had."""

    def __init__(self):
        self.batches = []

    def rank(self, batch, texts):
        self.batches.append(len(texts))
        return super().rank(batch, texts)


GRADED = ["red", "red or blue", "a red circle", "blue", "not red", "red blue green", "top"]


@unhurried
@given(st.lists(st.sampled_from(GRADED), min_size=2, max_size=7), st.integers(0, 9))
def test_duels_without_a_fault_find_the_oracles_best_and_pairs_its_whole_order(group, seed):
    truth = RuleOracle().rank([COLOR], [group]).ranks[0].tolist()
    n = len(set(group))
    for asks, calls in (("pairs", max(n * (n - 1) // 2, 1)), ("tournament", max(2 * (n - 1), 1))):
        counting = Counting()
        ranks = combine.DuelOracle(counting, asks, seed).rank([COLOR], [group]).ranks[0].tolist()
        assert sum(counting.batches) == calls and len(counting.batches) == (
            1 if asks == "pairs" else 1 + (n - 1).bit_length()
        )
        assert ranks == competition_ranks(ranks)
        assert [r == 0 for r in ranks] == [r == 0 for r in truth]  # all that tie with the best are best
        if asks == "pairs":
            assert ranks == truth


def test_a_knock_out_by_hand():
    """Strengths 4 > 3 > 2 > 1; drawn 2, 4, 1, 3: 2 meets all first. Seeds 4, 3 (a point each), 2 (1/3), 1."""
    play, meetings = combine.knock_out([2, 4, 1, 3]), []
    pairs = next(play)
    while True:
        meetings.append(pairs)
        try:
            pairs = play.send([float(one > other) for one, other in pairs])
        except StopIteration as end:
            rank_of = end.value
            break
    assert meetings == [[(2, 4), (2, 1), (2, 3)], [(4, 1), (3, 2)], [(4, 3)]]
    assert sorted(rank_of, key=rank_of.get) == [4, 3, 2, 1]  # 2 and 1 left in one round: 1/4 against 0 points


def test_a_group_with_a_failed_duel_fails_alone_and_its_cause_is_kept():
    class Forgetful(RuleOracle):
        def rank(self, batch, texts):
            ok = torch.tensor([sorted(group) != ["blue", "red"] for group in texts])
            notes = ["" if x else "cut: words" for x in ok.tolist()]
            return Ranking(super().rank(batch, texts).ranks, ok, notes, sums={"judge_calls": len(texts)})

    groups = [["red", "blue", "top"], ["top left", "top", "x"]]
    for asks in ("pairs", "tournament"):
        ranking = combine.DuelOracle(Forgetful(), asks, 0).rank([COLOR, PLACE], groups)
        assert ranking.ok.tolist() == [False, True] and ranking.notes == ["cut: words", ""]
        assert ranking.ranks[1].tolist() == [0, 1, 2] and ranking.sums["judge_calls"] >= 6


def test_scores_of_several_permutations_are_averaged():
    class Scoring:
        def rank(self, batch, texts):  # the place in which it is shown, beside the length
            scores = torch.tensor([[float(len(text) + i) for i, text in enumerate(group)] for group in texts])
            return Ranking(torch.zeros(scores.shape, dtype=torch.int64), scores=scores)

    ranking = PermutedOracle(Scoring(), 3, "off", 0).rank([COLOR], [["a", "bb", "ccc"]])
    assert ranking.scores.tolist() == [[2.0, 3.0, 4.0]]  # each stands in each place once: 1 is added to all


def test_a_text_that_fills_a_group_up_counts_once_in_each_ranking():
    """Of "a", "a", "bb" two texts are shown, the last of them twice; a judge ties the two and likes a first
    place by one point more: each text has its length and the mean of 1 and 0."""

    class Judge:
        def rank(self, batch, texts):
            shown = [list(dict.fromkeys(group)) for group in texts]
            scores = [
                [float(len(text) + (text == one[0])) for text in g]
                for g, one in zip(texts, shown, strict=True)
            ]
            return Ranking(torch.zeros(len(texts), 3, dtype=torch.int64), scores=torch.tensor(scores))

    ranking = PermutedOracle(Judge(), 2, "off", 0).rank([COLOR], [["a", "a", "bb"]])
    assert ranking.scores.tolist() == [[1.5, 1.5, 2.5]]


def test_pairs_within_and_across_groups_are_counted_by_hand():
    """Two questions of two answers; the second question's scores are on a scale of their own."""
    right = torch.tensor([[True, False], [True, False]])
    ranking = Ranking(torch.tensor([[0, 1], [0, 0]]), scores=torch.tensor([[9.0, 8.0], [3.0, 3.0]]))
    sums = {name: float(x) for name, x in feedback.pair_sums(right, ranking).items()}
    # within: 9 > 8, 3 = 3; across: 9 > 3 right against wrong of the other, 3 < 8
    assert sums == {"order_pairs": 2, "order_wins": 1.5, "score_pairs": 2, "score_wins": 1.5,
                    "across_pairs": 2, "across_wins": 1}  # fmt: skip


def test_ndcg_agreement_of_worked_cases():
    assert ndcg_agreement([0, 1, 2], [0, 1, 2]) == 1
    assert ndcg_agreement([0, 1, 2], [0, 0, 0]) is None
    # gains 1, 1 / (2 log2 3) = 0.315465; discounts 1, 1 / log2 3 = 0.630930
    # reversed (0.630930 + 0.315465) / (1 + 0.315465 * 0.630930); tied (1.315465 * 0.815465) / the same
    assert ndcg_agreement([1, 0], [0, 1]) == pytest.approx(0.946395 / 1.199036, abs=1e-5)
    assert ndcg_agreement([0, 0], [0, 1]) == pytest.approx(1.072716 / 1.199036, abs=1e-5)


def test_kendall_tau_of_worked_cases():
    assert kendall_tau([0, 1, 2], [0, 1, 2]) == 1
    assert kendall_tau([2, 1, 0], [0, 1, 2]) == -1
    assert kendall_tau([0, 2, 1], [0, 1, 2]) == pytest.approx(1 / 3)  # 2 concordant, 1 discordant, of 3
    assert kendall_tau([0, 0, 2], [0, 1, 2]) == pytest.approx(2 / math.sqrt(6))  # tau-b: 2 / sqrt(2 * 3)
    assert kendall_tau([0, 0], [0, 1]) is kendall_tau([0, 1], [0, 0]) is None


@unhurried
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=6), st.randoms())
def test_agreement_does_not_depend_on_the_order_of_the_group(pairs, random):
    shuffled = random.sample(pairs, len(pairs))
    for agreement, lowest in ((ndcg_agreement, 0), (kendall_tau, -1)):
        value, again = (agreement(*map(list, zip(*rows, strict=True))) for rows in (pairs, shuffled))
        assert value is None or lowest - 1e-9 <= value <= 1 + 1e-9
        assert value == (None if value is None else pytest.approx(again))


class Scored:
    """Scores that it is told, and their order."""

    def __init__(self, scores):
        self.scores = torch.tensor(scores, dtype=torch.float64)

    def rank(self, batch, texts):
        return Ranking(ranks_from_scores(self.scores), scores=self.scores)


def bent(scores, bend, noise, seed=0, top=2.0):
    return combine.BentOracle(Scored(scores), torch.Generator().manual_seed(0), bend, noise, top, seed)


def test_bent_scores_are_shares_of_ten_by_a_curve_of_each_question():
    texts, scores = [["a", "b", "c"]] * 2, [[0.0, 1.0, 2.0]] * 2
    plain = bent(scores, bend=0.0, noise=0.0).rank([COLOR, PLACE], texts)
    assert plain.scores.tolist() == [[0, 5, 10]] * 2 and plain.ranks.tolist() == [[2, 1, 0]] * 2
    curves = {
        seed: bent(scores, bend=1.0, noise=0.0, seed=seed).rank([COLOR, PLACE], texts).scores
        for seed in range(5)
    }
    for found in curves.values():
        assert (found == found.round()).all() and (found.diff(dim=1) >= 0).all()
        assert (found[:, 0] <= 6).all() and (found[:, 2] >= 7).all()
    flat = torch.stack(list(curves.values())).flatten(0, 1)
    assert len({tuple(row) for row in flat.tolist()}) > 3  # apart by question and by seed
    shares = (flat[:, 1] - flat[:, 0]) / (flat[:, 2] - flat[:, 0]).clamp(min=1)
    assert shares.min() < 0.4 and shares.max() > 0.6  # a straight line would have 1 / 2


def test_a_bent_oracles_noise_is_of_each_text_and_equal_texts_tie():
    texts = [["a", " a", "b", "c", "d"]] * 20
    ranking = bent([[1.0] * 5] * 20, bend=0.0, noise=0.3).rank([COLOR] * 20, texts)
    assert (ranking.scores[:, 0] == ranking.scores[:, 1]).all() and ranking.ranks.equal(
        ranks_from_scores(ranking.scores)
    )
    for one, other in itertools.combinations(range(1, 5), 2):
        assert (ranking.scores[:, one] != ranking.scores[:, other]).any()
    assert (ranking.scores >= 0).all() and (ranking.scores <= 10).all() and ranking.scores.std() > 1


def test_orders_shown_depend_on_the_seed():
    shown = []

    class Watching(RuleOracle):
        def rank(self, batch, texts):
            shown.append(texts)
            return super().rank(batch, texts)

    for seed in (0, 0, 1):
        PermutedOracle(Watching(), 1, "off", seed).rank([COLOR] * 4, [["a", "b", "c", "d"]] * 4)
    assert shown[0] == shown[1] != shown[2]


def test_a_swap_and_the_bias_for_the_first_place_are_drawn_apart():
    oracle = noisy(FixedOracle([[0, 1]] * 4000), swap_prob=0.5, position_bias=0.5)
    ranks = oracle.rank([COLOR] * 4000, [["a", "b"]] * 4000).ranks
    assert (ranks[:, 0] == 0).float().mean().item() == pytest.approx(0.75, abs=0.03)  # not swapped, or lifted


def completions(lengths, T):
    mask = torch.arange(T) < torch.tensor(lengths)[:, None]
    ids = mask.long()
    return Completions(ids, mask, -ids.float(), None, torch.tensor(lengths) < T)


def test_a_steps_numbers_by_hand_and_of_a_failed_group_no_order_is_read():
    """Two ranked groups and one whose ranking failed; the oracle's best of the second is wrong."""
    texts = [["red", "blue", "green"], ["blue", "red", "red"], ["blue", "blue", "green"]]
    ranks, notes = torch.tensor([[0, 1, 2], [0, 1, 1], [0, 1, 2]]), ["", "", "cut: words"]
    ranking = Ranking(ranks, torch.tensor([True, True, False]), notes)
    rollout = completions([1, 2, 3, 4, 1, 2, 3, 4, 1], 4)  # two are cut
    groups = feedback.Groups(torch.arange(3), [COLOR] * 3, texts, rollout, ranking)
    policy_ranks = torch.tensor([[0, 1, 2], [0, 1, 1], [2, 1, 0]])
    advantages = torch.tensor([[1.0, -1, 0], [2, 0, -2], [0, 0, 0]])
    numbers = feedback.feedback_numbers(groups, policy_ranks, advantages)
    wanted = {
        "accuracy": 3 / 9, "oracle_best_accuracy": 1 / 2, "ndcg": 1, "kendall_tau": 1, "groups": 3,
        "asked_groups": 3, "advantage_rms": (10 / 9) ** 0.5, "mean_tokens": 21 / 9, "cut_share": 2 / 9,
        "tokens": 21, "dead_groups": 0, "failed_groups": 1, "order_right": 2 / 4,
    }  # fmt: skip
    assert {name: numbers[name] for name in wanted} == pytest.approx(wanted)
    assert numbers["failed_by_cause"] == {"cut": 1}


def test_a_step_is_full_when_as_many_groups_carry_a_signal_and_further_ones_stand_behind():
    live, dead = torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0, 0], [0, 1]])

    def groups(name, ranks, T):
        rollout = completions([T] * 4, T)
        return feedback.Groups(torch.arange(2), [COLOR, PLACE], [[name] * 2] * 2, rollout, Ranking(ranks))

    first, second = groups("a", dead, 2), groups("b", live, 3)
    assert first.after(None) is first and not first.fill(2) and first.fill(1) and second.fill(2)
    both = second.after(first)
    assert both.fill(3) and not both.fill(4) and both.texts == first.texts + second.texts
    assert both.ranking.live.tolist() == [False, True, True, True] and both.rows.tolist() == [0, 1, 0, 1]
    assert both.rollout.completion_mask.sum(dim=1).tolist() == [2] * 4 + [3] * 4


def test_openings_are_of_three_words_and_tied_pairs_say_nothing_of_a_place():
    said = [["it is red", "it is blue"], ["It is RED now", "no"]]
    assert feedback_sums(said, Ranking(torch.tensor([[0, 1], [0, 1]])))["repeated"] == 2
    counts = combine.settle([{"a": 0, "b": 0, "c": 2}], False)[2]
    assert (counts["early"], counts["late"]) == (2, 0)


def test_a_failed_ranking_says_nothing_of_the_canary_and_rewards_of_the_planted_answers_are_not_counted():
    failed = AnchoredOracle(FixedOracle([[0, 1, 2, 2], [0, 1, 2, 3]], [False, True]), False, True)
    sums = failed.rank([COLOR, PLACE], [["a", "b"]] * 2).sums
    assert (sums["canaries"], sums["canary_errors"]) == (1, 0)
    anchored = AnchoredOracle(RewardOracle("sum", (1.0, 1.0, 0.1)), True, True).rank(
        [COLOR], [["red", "blue"]]
    )
    assert anchored.scores.shape == (1, 2) and not [name for name in anchored.sums if "reward_" in name]


def test_weights_overlap_and_think_of_the_dual_reward_are_those_given_and_rounding_noise_ties():
    question = Question("0", "a.mp4", "Which color?", "red", spans=((2.0, 8.0),))
    texts = ["red", "blue, 2 to 5 s", "<think>so</think><answer>red, 2 to 8 s</answer>"]
    weighed_scores = RewardOracle("sum", (2.0, 3.0, 0.5)).rank([question], [texts]).scores
    assert weighed_scores.tolist() == [[2.0, 3 * 0.5 + 0.5, 2 + 3]]  # a think part is no form here ...
    iop = RewardOracle("sum", (1.0, 1.0, 0.1), "iop", True).rank([question], [texts]).scores
    assert iop.tolist() == [[1.0, 1.0, 2.1]]  # ... and with think it is
    event = Question("0", "a.mp4", "When?", "", spans=((0.0, 1.0),))
    spans = ["0.1 to 0.2", "0.7 to 0.8", "0.3 to 0.4", "2 to 3"]  # IoU .1 but for rounding
    for by in ("sum", "lexicographic"):
        assert RewardOracle(by, (1.0, 1.0, 0.1)).rank([event], [spans]).ranks.tolist() == [[0, 0, 0, 3]]


def test_a_function_is_told_the_options_and_not_asked_about_equal_texts():
    asked = []
    oracle = FunctionOracle(lambda question, texts, **_: asked.append(question) or [0, 1])
    quiz = Question("2", "a.mp4", "Which?", "red", options=("red", "blue"), answer_index=0)
    assert oracle.rank([quiz, COLOR], [["A", "B"], ["a", "a "]]).ranks.tolist() == [[0, 1], [0, 0]]
    assert asked == ["Which?\n(A) red (B) blue"]


def test_counts_that_one_part_alone_has_are_joined_too():
    parts = [Ranking(torch.tensor([[0, 1]]), sums=sums) for sums in ({"a": 1}, {"a": 2, "b": 3})]
    assert Ranking.joined(parts).sums == {"a": 3, "b": 3}
