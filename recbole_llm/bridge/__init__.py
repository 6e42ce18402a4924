"""RecBole's side of the model: options, dataset, trainer, evaluation, experiments, repairs of RecBole."""
