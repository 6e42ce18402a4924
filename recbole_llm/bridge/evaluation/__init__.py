"""Full-ranking evaluation inside RecBole: rows to rank, ranking without a matrix, the report on cold-start items."""
