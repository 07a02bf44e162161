"""Projections onto hyperplane ∩ box against a linear program, enumeration of active sets, and brute force."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from dyart.projection import NORMS, lookup_norm, project_l2, project_linf

PIXEL = st.sampled_from([0.0, 1.0, 0.5]) | st.floats(0, 1)
# Not tiny: with weights like 1e-17 beside 1, the references' own tolerances decide.
WEIGHT = st.sampled_from([0.0, 0.0, 1.0, -1.0]) | st.floats(1e-3, 10) | st.floats(-10, -1e-3)


@st.composite
def problems(draw, most_coordinates):
    """x (d,), w (d,) and c, where the box reaches the hyperplane."""
    d = draw(st.integers(1, most_coordinates))
    x = np.array(draw(st.lists(PIXEL, min_size=d, max_size=d)))
    w = np.array(draw(st.lists(WEIGHT, min_size=d, max_size=d)))
    share = draw(st.floats(0, 1))
    return x, w, share * w @ (extreme(x, w, draw(st.sampled_from([1, -1]))) - x)


@pytest.mark.parametrize("project", [project_linf, project_l2])
@pytest.mark.parametrize(
    ("x", "w", "c", "move"),
    [
        ([0.0, 0.0, 1.0], [0.0, 1e-141, 1.0], 1e-141, [0.0, 1.0, 0.0]),
        ([0.0, 0.0], [1e-8, -5.0], 5e-9, [0.5, 0.0]),
    ],
)
def test_a_tiny_weight_carries_the_move_where_no_other_coordinate_has_room(project, x, w, c, move):
    x, w, c, move = (torch.tensor([value], dtype=torch.float64) for value in (x, w, c, move))
    torch.testing.assert_close(project(x, w, c), move)


def extreme(x, w, sign):
    """The corner of the box furthest along sign · w, with x where w is zero."""
    return np.where(w == 0, x, (np.sign(w) == sign).astype(float))


def solve(project, x, w, c):
    return project(*(torch.tensor(np.array([value])) for value in (x, w, c)))[0].numpy()


def smallest_linf(x, w, c):
    """min t subject to |δ_i| ≤ t, w·δ = c and x + δ in the box, as a linear program."""
    d, scale = len(x), max(np.abs(w).max(), 1e-300)
    identity, ones = np.eye(d), np.ones((d, 1))
    result = linprog(
        [0] * d + [1],
        A_ub=np.block([[identity, -ones], [-identity, -ones]]),
        b_ub=np.zeros(2 * d),
        A_eq=[[*(w / scale), 0]],
        b_eq=[c / scale],
        bounds=[(-value, 1 - value) for value in x] + [(0, None)],
        options={"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10},
    )
    assert result.success, result.message
    return result.fun


def smallest_l2(x, w, c):
    """The shortest of all points that hold some coordinates at a face of the box and solve for the others."""
    best, scale = np.inf, max(np.abs(w).max(), 1e-300)
    w, c = w / scale, c / scale
    for held in itertools.product(["low", "high", "free"], repeat=len(x)):
        held = np.array(held)
        delta = np.where(held == "low", -x, np.where(held == "high", 1 - x, 0))
        free = held == "free"
        missing = c - w @ delta
        if free.any() and w[free] @ w[free] > 0:
            delta[free] = w[free] * missing / (w[free] @ w[free])
        if np.isclose(w @ delta, c, atol=1e-9) and (x + delta > -1e-9).all() and (x + delta < 1 + 1e-9).all():
            best = min(best, np.linalg.norm(delta))
    return best


def assert_feasible(delta, x, w, c):
    assert ((x + delta >= 0) & (x + delta <= 1)).all()
    assert w @ delta == pytest.approx(c, abs=1e-10 * max(1, np.abs(w).sum()))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(problems(6))
@example((np.array([0.9, 0.2]), np.array([1.0, 1.0]), 0.5))  # the first coordinate saturates
@example((np.array([0.5, 0.5, 0.5]), np.array([0.0, 0.0, 2.0]), 1.0))  # two zero weights; reached only at the face
@example((np.array([0.3]), np.array([0.0]), 0.0))
def test_linf_moves_as_little_as_the_linear_program(problem):
    delta = solve(project_linf, *problem)
    assert_feasible(delta, *problem)
    assert np.abs(delta).max() == pytest.approx(smallest_linf(*problem), abs=1e-7)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(problems(4))
@example((np.array([0.9, 0.2]), np.array([2.0, 1.0]), 0.7))
def test_l2_moves_as_little_as_the_best_active_set(problem):
    delta = solve(project_l2, *problem)
    assert_feasible(delta, *problem)
    assert np.linalg.norm(delta) == pytest.approx(smallest_l2(*problem), abs=1e-6)


@pytest.mark.parametrize(("name", "order"), [("Linf", np.inf), ("L2", 2)])
def test_no_point_of_the_plane_is_closer(name, order):
    """Brute force over the points of the plane in two dimensions."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x, w = rng.random(2), rng.normal(size=2)
        c = 0.8 * w @ (extreme(x, w, 1) - x)
        first = np.linspace(-x[0], 1 - x[0], 20001)
        moves = np.stack([first, (c - w[0] * first) / w[1]], 1)
        moves = moves[((x + moves >= 0) & (x + moves <= 1)).all(1)]
        delta = solve(NORMS[name].project, x, w, c)
        assert np.linalg.norm(delta, order) == pytest.approx(np.linalg.norm(moves, order, 1).min(), abs=2e-4)


@pytest.mark.parametrize("project", [project_linf, project_l2])
@pytest.mark.parametrize("sign", [1, -1])
def test_unreachable_plane_goes_to_the_furthest_corner(project, sign):
    x, w = np.array([0.0, 0.2, 0.7, 1.0, 0.4]), np.array([1.0, -2.0, 1e-7, 3.0, 0.0])
    for c in (sign * 100.0, sign * np.inf):
        np.testing.assert_allclose(x + solve(project, x, w, c), extreme(x, w, sign), atol=1e-12)


@pytest.mark.parametrize("project", [project_linf, project_l2])
def test_no_gradient_no_move(project):
    x = torch.rand(3, 5)
    assert (project(x, torch.zeros(3, 5), torch.tensor([1.0, -1.0, 0.0])) == 0).all()
    assert project(x[:0], x[:0], x[:0, 0]).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(NORMS))
def test_rows_are_independent_and_keep_their_dtype(name, dtype):
    """A batch of hyperplanes at the scale of images, each row as if alone, and exact to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(5, 3072, generator=generator, dtype=dtype)
    w = torch.randn(5, 3072, generator=generator, dtype=dtype) * torch.logspace(-20, 4, 5, dtype=dtype)[:, None]
    c = w.abs().sum(1) * torch.tensor([0.03, -0.001, 0.2, 0.0, -0.1], dtype=dtype)
    delta = NORMS[name].project(x, w, c)
    assert delta.dtype == dtype
    torch.testing.assert_close((w * delta).sum(1), c, rtol=100 * torch.finfo(dtype).eps, atol=0)
    alone = torch.cat([NORMS[name].project(x[i : i + 1], w[i : i + 1], c[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(delta, alone, rtol=1e-5, atol=0)


def test_steps_of_accelerators_meet_the_plane(monkeypatch):
    """A fixed number of Newton steps ends on the plane that is as far as margins are, at the scale of images."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(30, 3072, generator=generator).round(decimals=1)
    w = torch.randn(30, 3072, generator=generator) ** 3
    c = w.abs().sum(1) * torch.logspace(-4, -1, 30)
    monkeypatch.setattr("dyart.projection.has_fixed_shapes", lambda x: True)
    for norm in NORMS.values():
        torch.testing.assert_close((w * norm.project(x, w, c)).sum(1), c, rtol=1e-5, atol=0)


def test_norms_and_duals():
    rows = torch.tensor([[3.0, -4.0], [0.0, 0.0]])
    assert NORMS["Linf"].length(rows).tolist() == [4, 0]
    assert NORMS["Linf"].dual(rows).tolist() == [7, 0]
    assert NORMS["L2"].length(rows).tolist() == NORMS["L2"].dual(rows).tolist() == [5, 0]


def test_unknown_norm_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown norm 'L1'.*Linf, L2"):
        lookup_norm("L1")
