"""Work that takes longer than a request: merges and bakes as rows, run in child processes.

models      the rows: Job, Recipe, Edge
schemas     what requests and answers look like
queue       the protocol: claim, beat, hand back, finish; every change conditional on the fence
inputs      REFs of a recipe -> commits and blobs of this hub
scratch     folders of links to blobs under the names their readers need
service     submit, read, list, cancel, recipes
lineage     which file was made from which
child       `python -m hub.jobs.child`: the only place of the hub where tensors are computed
confine     what the child does to itself: limits, and dying with its parent
process     starting, hearing and ending that child
attempt     one attempt: hear the child, extend the lease, say how it ended
dispatcher  claim -> child -> publish, in threads of the server or in `graft worker`
results     checks a child's output and publishes it with its card and lineage
card        the part of a README that tells what a result was made of
events      the changes of one job as server-sent events
routes      the HTTP surface

Imports: models <- schemas, queue <- inputs, lineage <- service, results <- dispatcher; routes on top.
"""
