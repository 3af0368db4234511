"""Parameter sync: a training PS keeps serving replicas fresh while training goes on.

Tables note which ids change (`trilith_services.ps.engine.touched`). Once an interval `Syncer` makes a batch of them in
the `ChangeLog`; each `Target` follows the log with a cursor of its own and sends the rows as they are when it sends
them, so a push may be repeated, and several changes of one row are one. A target that begins, or that has fallen so
far behind that the log no longer knows what it lacks, is given whole tables first.
"""
