-- Facts only; winners are queries. Every `-- version N` section below is applied once, in order,
-- to a file of version N - 1. Sections that a release has shipped are never edited.

-- version 1

-- What a figure was measured on. The digests are over the canonical JSON beside them.
CREATE TABLE environment (
    id INTEGER PRIMARY KEY,
    silicon TEXT NOT NULL,
    silicon_digest TEXT NOT NULL,
    software TEXT NOT NULL,
    software_digest TEXT NOT NULL,
    UNIQUE (silicon_digest, software_digest)
) STRICT;

-- `machine` is a Machine as JSON; `protocol` is the version of the way it was measured.
CREATE TABLE calibration (
    id INTEGER PRIMARY KEY,
    environment INTEGER NOT NULL REFERENCES environment (id),
    disk_device TEXT NOT NULL,
    protocol INTEGER NOT NULL,
    machine TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;

CREATE INDEX calibration_by_place ON calibration (environment, disk_device);

-- One execution of a plan. `budget` is bytes by tier and `workload` a Workload, both as JSON;
-- peaks are bytes of the ram tier; `stop` says how it ended.
CREATE TABLE run (
    id INTEGER PRIMARY KEY,
    environment INTEGER NOT NULL REFERENCES environment (id),
    plan_digest TEXT NOT NULL,
    policy TEXT NOT NULL,
    budget TEXT NOT NULL,
    workload TEXT NOT NULL,
    predicted_seconds REAL NOT NULL,
    measured_seconds REAL NOT NULL,
    predicted_peak_bytes INTEGER NOT NULL,
    measured_peak_bytes INTEGER NOT NULL,
    stop TEXT NOT NULL CHECK (stop IN ('done', 'interrupted', 'failed')),
    created_at TEXT NOT NULL
) STRICT;

-- Seconds are sums over `count` tasks of the class.
CREATE TABLE task_sample (
    run INTEGER NOT NULL REFERENCES run (id),
    task_class TEXT NOT NULL,
    predicted_seconds REAL NOT NULL,
    measured_seconds REAL NOT NULL,
    count INTEGER NOT NULL
) STRICT;

CREATE INDEX task_sample_by_class ON task_sample (task_class);
