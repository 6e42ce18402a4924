"""The recommender under its first name, kept for programs that import it from here; every export's README shows it."""

from recbole_llm.retrieval.recommender import Recommendation, Recommended, Recommender, Request

__all__ = ["Recommendation", "Recommended", "Recommender", "Request"]
