"""The recommender under its first name, kept for programs that import it from here; every export's README shows it."""

from recbole_llm.retrieval.recommender import Reason, Recommendation, Recommended, Recommender, Request

__all__ = ["Reason", "Recommendation", "Recommended", "Recommender", "Request"]
