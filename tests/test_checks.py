"""The shared checks: what passes comes back, what does not is named with the rule."""

import math

import pytest
import torch

from graph_kd._checks import check_choice, check_count, check_floating, check_positive


@pytest.mark.parametrize(("value", "minimum"), [(1, 1), (7, 1), (0, 0), (-4, -4)])
def test_count_returns_an_int_from_the_minimum_on(value, minimum):
    assert check_count("k", value, minimum) is value


@pytest.mark.parametrize("value", [True, False, 1.0, "2", None, torch.tensor(2)])
def test_count_rejects_what_is_no_int(value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^`k` must be an int; got .* \({kind}\)\.$"):
        check_count("k", value)


@pytest.mark.parametrize(("value", "minimum"), [(0, 1), (-3, 1), (1, 2), (-5, -4)])
def test_count_rejects_less_than_the_minimum(value, minimum):
    with pytest.raises(ValueError, match=rf"^`k` must be an int ≥ {minimum}; got {value}\.$"):
        check_count("k", value, minimum)


def test_count_begins_at_one():
    assert check_count("k", 1) == 1
    with pytest.raises(ValueError, match="≥ 1; got 0"):
        check_count("k", 0)


@pytest.mark.parametrize("value", [1, 0.5, 1e-300, 1e300])
def test_positive_returns_a_float(value):
    checked = check_positive("bound", value)
    assert type(checked) is float
    assert checked == value


@pytest.mark.parametrize("value", [0, 0.0, -0.0, -1, math.inf, -math.inf, math.nan])
def test_positive_rejects_what_is_not_finite_and_above_zero(value):
    with pytest.raises(ValueError, match=rf"^`bound` must be a finite number > 0; got {value}\.$"):
        check_positive("bound", value)


@pytest.mark.parametrize("value", [True, "1", None, 1j, torch.tensor(1.0)])
def test_positive_rejects_what_is_no_number(value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^`bound` must be a number; got .* \({kind}\)\.$"):
        check_positive("bound", value)


@pytest.mark.parametrize("or_callable", [True, False])
@pytest.mark.parametrize("value", ["a", "b", None])
def test_choice_accepts_each_of_the_choices(value, or_callable):
    check_choice("gate", value, ("a", "b", None), or_callable=or_callable)


def test_choice_accepts_a_callable_only_where_one_is_taken():
    check_choice("gate", abs, ("a",), or_callable=True)
    with pytest.raises(ValueError, match=r"^`gate` must be one of 'a'; got <built-in"):
        check_choice("gate", abs, ("a",), or_callable=False)


@pytest.mark.parametrize("value", ["A", "", None, 0, 1.5])
def test_choice_lists_what_there_is(value):
    with pytest.raises(ValueError, match=rf"^`gate` must be one of 'a', 'b'; got {value!r}\.$"):
        check_choice("gate", value, ("a", "b"), or_callable=False)
    with pytest.raises(ValueError, match=rf"one of 'a', 'b' or a callable; got {value!r}\.$"):
        check_choice("gate", value, ("a", "b"), or_callable=True)


def test_choice_shows_none_among_the_choices():
    with pytest.raises(ValueError, match=r"^`squash` must be one of None, 'tanh'; got 'relu'\.$"):
        check_choice("squash", "relu", (None, "tanh"), or_callable=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_returns_the_very_tensor(dtype):
    value = torch.zeros(2, dtype=dtype)
    assert check_floating("features", value) is value


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_floating_rejects_other_kinds_and_says_how_to_convert(dtype):
    message = rf"^`features` must be a floating-point tensor; got {dtype}\. Convert .*`\.float\(\)`"
    with pytest.raises(TypeError, match=message):
        check_floating("features", torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("value", [None, 1.0, [torch.zeros(2)], "x"])
def test_floating_rejects_what_is_no_tensor(value):
    kind = type(value).__name__
    with pytest.raises(TypeError, match=rf"^`features` must be a tensor; got {kind}\.$"):
        check_floating("features", value)
