"""A record with figures of every kind."""


def interval(value, width=0.02):
    return {"value": value, "low": value - width, "high": value + width}


def share(value, users=100, targets=200):
    return {"users": users, "targets": targets, **interval(value)}


def figures(value):
    return {
        "found": interval(value),
        "users_with_a_hit": value,
        "ndcg": value / 2,
        "recall": value,
        "items_shown": 350,
        "median_place": 40.0,
        "shown_by_popularity": {"head": 0.6, "middle": 0.3, "tail": 0.1, "cold": 0.0},
        "by_popularity": {"head": share(value + 0.1), "middle": share(value), "tail": share(value - 0.1)},
        "by_activity": [{"from": 1, **share(value - 0.05)}, {"from": 6, **share(value)}],
    }


def made_record(**changed):
    """A record; ``changed`` replaces parts of it."""
    record = {
        "version": 1,
        "date": "2026-11-30",
        "model": "LLMTwoTower",
        "dataset": "shop",
        "k": 10,
        "rated": False,
        "split": {"order": "RO", "by_user": True, "shares": [0.8, 0.1, 0.1], "files": False, "seed": 2020},
        "data": {"users": 800, "items": 400, "interactions": 9000, "training": 7200, "test": 900},
        "measured": {"users": 760, "of": 760, "targets": 900},
        "best_baseline": "ItemKNN",
        "models": {"LLMTwoTower": figures(0.36), "bestsellers": figures(0.21), "ItemKNN": figures(0.3)},
        "about": {"bestsellers": "the items with most training interactions", "ItemKNN": "100 neighbours, shrink 0"},
        "not_fitted": {},
        "lead": interval(0.06),
        "popularity": {"head": {"items": 10}, "middle": {"items": 40}, "tail": {"items": 340}, "cold": {"items": 10}},
        "left_out": {
            "items_without_interactions": 10,
            "items_that_cannot_be_shown": 4,
            "items_never_shown": 50,
            "users_without_history": 3,
            "measured_users_without_history": 1,
        },
        "calibration": [{"said": 0.01 * n, "came": 0.011 * n, "pairs": 760} for n in range(1, 11)],
        "metrics": {"test": {"ndcg@10": 0.18, "recall@10": 0.36}, "valid": {"ndcg@10": 0.19}},
        "history": {
            "loss": [1.0 / n for n in range(1, 31)],
            "valid": [[n, 0.1 + n / 200] for n in range(1, 31)],
            "valid_metric": "NDCG@10",
            "search": [{"setting": f"ridge {2**n}", "metric": "NDCG@10", "value": 0.1 + n / 50} for n in range(4)],
            "stages": [{"stage": "closed form", "seconds": 0.4}, {"stage": "towers", "seconds": 2.8}],
        },
    }
    return record | changed
