"""Pictures that are kept: links to them that expire, and each tenant's history. The files are in `training/storage`."""
