"""The commands of ``recbole-llm``, a module each: arguments, printing, exit codes."""
