"""Human studies: from fitted explainers and images to a running study, and from its answers to figures and tests.

The modules, in the order of a study: :mod:`configuration` (the settings), :mod:`preparation` (all pictures, rendered
beforehand), :mod:`protocol` (each participant's steps), :mod:`store` (the database), :mod:`server` (the running study),
:mod:`static` (the same page without a server), :mod:`export` (a Psych-DS folder), :mod:`analysis` and :mod:`findings`
(figures, tests and the page of results), :mod:`simulation` (participants with known behaviour).

Nothing is imported here: the extra ``study`` brings flask, waitress and statsmodels.
"""
