"""Nearest neighbours and linear classifiers on features."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import linear_model, preprocessing

from nestnet.errors import UserError
from nestnet.evaluators import readouts

CLASSES = 3


def random(seed, size, dim=6):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(size, dim)).astype(np.float32) * rng.uniform(0.1, 5, (size, 1)).astype(np.float32)


def clusters(seed, size):
  labels = np.random.default_rng(seed).integers(0, CLASSES, size)
  return random(seed, size) + 0.7 * np.eye(CLASSES, 6, dtype=np.float32)[labels] + 3, labels


def by_hand(bank, labels, queries, k, most, temperature=0.07):
  """As poa.md 1.10 says it, a query at a time."""
  found = []
  unit = lambda x: np.asarray(x, np.float64) / np.linalg.norm(np.asarray(x, np.float64))
  for query in queries:
    similar = [float(unit(query) @ unit(x)) for x in bank]
    nearest = sorted(range(len(bank)), key=lambda i: -similar[i])[:most]
    weights = np.exp([similar[i] / temperature for i in nearest])
    weights /= weights.sum()
    votes = np.zeros(CLASSES)
    for i, weight in list(zip(nearest, weights))[:k]:
      votes[labels[i]] += weight
    found.append(int(votes.argmax()))
  return found


def test_neighbours_vote_as_by_hand():
  (bank, labels), queries, ks = clusters(0, 60), clusters(1, 40)[0], (1, 5, 20)
  found = readouts.knn(bank, labels, queries, ks, CLASSES)
  expected = [by_hand(bank, labels, queries, k, 20) for k in ks]
  np.testing.assert_array_equal(found, expected)
  assert len({tuple(row) for row in expected}) == 3
  # Votes are weighted: plain ones, of a high temperature, differ.
  plain = readouts.knn(bank, labels, queries, ks, CLASSES, temperature=1e3)
  np.testing.assert_array_equal(plain, [by_hand(bank, labels, queries, k, 20, 1e3) for k in ks])
  assert (plain != found).any()


def test_ties_go_to_the_first_in_the_bank_and_to_the_lowest_class():
  bank = np.array([[0, 1], [1, 0], [1, 0], [2, 0]], np.float32)
  labels, query = np.array([0, 2, 1, 1]), np.array([[1, 0]], np.float32)
  assert readouts.knn(bank, labels, query, (1, 2, 3), CLASSES).ravel().tolist() == [2, 1, 1]
  # Features of 0 have no direction, and are no number's cause.
  assert readouts.knn(bank, labels, 0 * query, (1,), CLASSES).ravel().tolist() == [0]


def test_small_banks_have_every_class_alike_and_are_drawn_anew():
  labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), (20, 7, 40)))
  draws = readouts.stratified(labels, CLASSES, 7, 5)
  assert draws.shape == (5, 21)
  for drawn in draws:
    assert np.bincount(labels[drawn]).tolist() == [7] * CLASSES and len(set(drawn.tolist())) == 21
  assert len({tuple(sorted(drawn)) for drawn in draws}) == 5
  np.testing.assert_array_equal(draws, readouts.stratified(labels, CLASSES, 7, 5))
  with pytest.raises(UserError, match="8 labels of each class: the bank has 7 of class 1; .* at most 7"):
    readouts.stratified(labels, CLASSES, 8, 5)


def test_draws_are_neighbours_in_each_small_bank():
  (bank, labels), queries = clusters(0, 60), clusters(1, 300)[0]
  draws = readouts.stratified(labels, CLASSES, 4, 3)
  found = readouts.knn_of_draws(bank, labels, draws, queries, (1, 5), CLASSES)
  assert found.shape == (3, 2, 300)
  for drawn, answers in zip(draws, found):
    np.testing.assert_array_equal(answers, readouts.knn(bank[drawn], labels[drawn], queries, (1, 5), CLASSES))


@pytest.mark.parametrize("ks, got", [((1, 61), "1, 61"), ((0, 5), "0, 5"), ((), "none")])
def test_a_bank_smaller_than_k_is_said(ks, got):
  bank, labels = clusters(0, 60)
  with pytest.raises(UserError, match=f"neighbours: got {got}; allowed is 1 to 60, the number of examples"):
    readouts.knn(bank, labels, bank, ks, CLASSES)


def test_logistic_regression_is_scikit_learns(monkeypatch):
  (bank, labels), (held, known), queries = clusters(0, 200), clusters(1, 100), clusters(2, 100)[0]

  def same(bank, labels, c):
    scaler = preprocessing.StandardScaler().fit(bank)
    model = linear_model.LogisticRegression(C=c, max_iter=1000).fit(scaler.transform(bank), labels)
    return lambda some: model.predict(scaler.transform(some))

  made = lambda *cs: readouts.logistic(bank, labels, held, known, cs)(queries)
  for c in (1e-4, 1.0):
    np.testing.assert_array_equal(made(c), same(bank, labels, c)(queries))
  # The strongest penalty of those that predict held-out examples best.
  cs = (1.0, 1e-5, 1e-2, 1.0001)
  shares = {c: np.mean(same(bank, labels, c)(held) == known) for c in sorted(cs)}
  best = max(shares, key=shares.get)
  assert shares[best] > min(shares.values())
  np.testing.assert_array_equal(made(*cs), same(bank, labels, best)(queries))
  monkeypatch.setattr(readouts, "FITTED", 50)
  np.testing.assert_array_equal(made(1.0), same(bank[::4], labels[::4], 1.0)(queries))


def test_the_probe_takes_the_rate_that_is_best_on_held_out_examples():
  apart = lambda seed: (lambda x, y: (x + 5 * np.eye(CLASSES, 6)[y], y))(*clusters(seed, 200))
  (bank, labels), (held, known), (queries, answers) = apart(0), apart(1), apart(2)
  share = lambda found: np.mean(found == answers)
  # A rate of 0 leaves it at zeros, where all is of class 0.
  made = lambda known, *rates: readouts.probe(bank, labels, held, known, CLASSES, rates)(queries)
  found = made(known, 0.3, 0.0, 0.03)
  assert share(found) > share(readouts.logistic(bank, labels, held, known)(queries)) - 0.05 > 0.6
  np.testing.assert_array_equal(found, made(known, 0.3, 0.0, 0.03))
  assert not made(0 * known, 0.3, 0.0, 0.03).any()
