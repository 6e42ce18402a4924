"""The rules by brute force: everything is scored, sorted and compared, in plain Python and float64."""

import math

ALPHA = 0.01
TIE = 2e-6


def values_of(attributes, name):
    value = attributes.get(name)
    if value is None:
        return []
    return list(dict.fromkeys(value)) if isinstance(value, list) else [value]


def holds(attributes, condition):
    for name, wanted in condition.items():
        own = values_of(attributes, name)
        if isinstance(wanted, dict):
            bounds = {
                "gt": lambda a, b: a > b,
                "gte": lambda a, b: a >= b,
                "lt": lambda a, b: a < b,
                "lte": lambda a, b: a <= b,
            }
            if not own or not all(bounds[bound](own[0], value) for bound, value in wanted.items()):
                return False
        elif not set(own) & set(wanted if isinstance(wanted, list) else [wanted]):
            return False
    return True


def logit_of(chance, score):
    m, n = chance
    x = (score - m.origin) * math.e ** (-m.exponent * n)
    total = m.slopes[0] * x + m.offset + m.user_gain * n
    for knot, before, after in zip(m.knots, m.slopes, m.slopes[1:], strict=False):
        total += (after - before) * max(x - knot, 0)
    return total


def score_of(chance, logit):
    """By bisection."""
    low, high = -1e4, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        if logit_of(chance, middle) < logit:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class Force:
    """One request.

    Args:
        items: row -> (score, attributes, content vector), of those that may be recommended at all.
        history: rows with weights.
        history_attributes: of those rows.
        chance: probability map and log length; ``None`` for a source without probabilities.
    """

    def __init__(self, items, history, history_attributes, chance):
        self.items, self.history, self.history_attributes, self.chance = items, history, history_attributes, chance

    def boosted(self, row, rules):
        score, attributes, _ = self.items[row]
        for boost in rules.boosts:
            if boost.add is not None and holds(attributes, boost.filter):
                score += boost.add
        factor = sum(math.log(b.odds) for b in rules.boosts if b.odds is not None and holds(attributes, b.filter))
        any_odds = any(b.odds is not None and holds(attributes, b.filter) for b in rules.boosts)
        return score_of(self.chance, logit_of(self.chance, score) + factor) if any_odds else score

    def fits(self, row, chosen, rules):
        for name, most in rules.caps.items():
            for value in values_of(self.items[row][1], name):
                if sum(value in values_of(self.items[other][1], name) for other in chosen) >= most:
                    return False
        return True

    def relevance(self, score):
        if self.chance is None:
            return max(score, 0.0)
        return 1 / (1 + math.exp(-logit_of(self.chance, score)))

    def likeness(self, a, b):
        return sum(x * y for x, y in zip(self.items[a][2], self.items[b][2], strict=True))

    def mix(self, name):
        shares = {}
        for (_, weight), attributes in zip(self.history, self.history_attributes, strict=True):
            own = values_of(attributes, name)
            for value in own:
                shares[value] = shares.get(value, 0.0) + weight / len(own)
        total = sum(shares.values())
        return {value: share / total for value, share in shares.items() if share > 0} if total > 0 else {}

    def divergence(self, p, rows, name):
        q = {}
        for row in rows:
            own = values_of(self.items[row][1], name)
            for value in own:
                q[value] = q.get(value, 0.0) + 1 / len(own) / len(rows)
        return sum(share * math.log(share / ((1 - ALPHA) * q.get(v, 0.0) + ALPHA * share)) for v, share in p.items())

    def candidates(self, rules, seen):
        """Rows that the conditions leave, best first."""
        only = None if rules.only is None else set(rules.only)
        rows = [
            row
            for row, (_, attributes, _) in self.items.items()
            if row not in seen
            and f"i{row}" not in rules.exclude
            and (only is None or f"i{row}" in only)
            and holds(attributes, rules.filter)
        ]
        scores = {row: self.boosted(row, rules) for row in rows}
        return sorted(rows, key=lambda row: (-scores[row], row)), scores

    def check(self, rules, seen, k, asked, got):
        """Compare a list of k without exploration, where ``asked`` were asked for; returns the scores of all candidates."""
        order, scores = self.candidates(rules, seen)
        name = None if rules.diversity is None else rules.diversity.attribute
        p = self.mix(name) if name else {}
        if rules.diversity is None or (name and not p):
            chosen = []
            for row in order:
                if len(chosen) < k and self.fits(row, chosen, rules):
                    chosen.append(row)
            assert got == chosen, rules
        else:
            self.check_trade_off(rules, order, scores, p, k, rules.diversity.pool(asked), got)
        return scores

    def check_trade_off(self, rules, order, scores, p, k, pool_size, got):
        """Every item of the list is the best of its place, up to the rounding of float32 cosines."""
        weight = rules.diversity.weight
        left, pool, chosen = list(order), [], []
        best = self.relevance(scores[order[0]]) if order else 1.0
        while len(chosen) < k:
            joining = [row for row in left if not pool or self.fits(row, chosen, rules)][:pool_size]
            if not joining:
                break
            left = left[left.index(joining[-1]) + 1 :]
            pool += joining
            while len(chosen) < k:
                open_rows = [row for row in pool if row not in chosen and self.fits(row, chosen, rules)]
                if not open_rows:
                    break
                gains = {}
                for row in open_rows:
                    relevance = self.relevance(scores[row]) / (best if best > 0 else 1.0)
                    if rules.diversity.attribute is None:
                        cost = max((self.likeness(row, other) for other in chosen), default=0.0)
                    else:
                        cost = self.divergence(p, [*chosen, row], rules.diversity.attribute)
                    gains[row] = (1 - weight) * relevance - weight * cost
                assert len(got) > len(chosen), ("short", rules)
                row = got[len(chosen)]
                assert gains.get(row, -math.inf) >= max(gains.values()) - TIE, rules
                chosen.append(row)
        assert got == chosen
