"""Defences: `defence.py` names the five slots a defence may fill; each other file is one defence."""
