"""The standing fleet: one service that trains and serves. What tenants upload and submit, how it stands, and the
service in one process over one base.

May import `serving` and `training`; it is below `ray_app` and knows no Ray. What is accepted is on the storage before
it is answered, so every process of the service may answer, and any of them may die."""
