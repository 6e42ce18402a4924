"""How a model is fitted: :func:`recbole_llm.fitting.pipeline.fit` shows the order, the other files the stages."""
