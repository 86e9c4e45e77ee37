"""Policies as a robot process uses them: observations and actions in robot units."""
