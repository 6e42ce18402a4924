"""The trainer of LLMTwoTower: epochs, checkpoints, interruption, tables spread over processes."""
