"""One function a DVC stage: read the inputs, call the library, write the outputs atomically, log to MLflow.

`world` makes what experiments start from (pocket world, profile, mixture), `detect` finds an unknown B, `experiment` is
one cell from its assignment to its report. Every stage takes the validated params.yaml and finds its files through
`cell`. What is heavy to import is imported where it is used, so that a stage starts as fast as its own work allows.
"""
