"""Numbers in Prometheus' text keep their digits."""

from recbole_llm.serving.metrics import Counter, Gauge


def test_large_counts_are_whole_and_small_shares_exact():
    counter = Counter()
    counter.add(12_345_678, kind="warm")
    counter.add(kind="warm")
    assert list(counter.lines("items")) == ['items{kind="warm"} 12345679']
    share = 123_456_789 / 987_654_321
    assert list(Gauge(lambda: {(): share}).lines("share")) == [f"share {share!r}"]
    assert list(Gauge(lambda: {(): True}).lines("up")) == ["up 1"]
