"""The recipe's sections of the models.

Without torch, so that commands that only plan start at once.
"""
