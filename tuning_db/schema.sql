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

-- version 2

-- Names that hold in every file, so that files can be merged: rows of version 1 get the digest of
-- what they say and of their place in this file, which a copy of the file gets as well.
ALTER TABLE calibration ADD COLUMN uid TEXT NOT NULL DEFAULT '';
UPDATE calibration SET uid = digest('calibration', id, disk_device, protocol, machine, created_at);
CREATE UNIQUE INDEX calibration_uid ON calibration (uid);

ALTER TABLE run ADD COLUMN uid TEXT NOT NULL DEFAULT '';
UPDATE run SET uid = digest('run', id, plan_digest, measured_seconds, created_at);
CREATE UNIQUE INDEX run_uid ON run (uid);

ALTER TABLE task_sample ADD COLUMN uid TEXT NOT NULL DEFAULT '';
UPDATE task_sample
SET uid = digest('task_sample', rowid, (SELECT uid FROM run WHERE run.id = run), task_class);
CREATE UNIQUE INDEX task_sample_uid ON task_sample (uid);

-- What is tuned: the operation (a whole schedule, or a kernel) and all that its code depends on
-- beside a trial's parameters. The digest is over both.
CREATE TABLE task (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    op TEXT NOT NULL,
    signature TEXT NOT NULL
) STRICT;

-- What it is tuned for; `source` says where it comes from (prompts:DIGEST, or a name).
CREATE TABLE workload (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    workload TEXT NOT NULL,
    source TEXT NOT NULL
) STRICT;

-- How a trial is timed.
CREATE TABLE protocol (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    protocol TEXT NOT NULL
) STRICT;

-- One call of the tuner. How it ended is a row of its own, which a killed one does not have.
CREATE TABLE tuning (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    environment INTEGER NOT NULL REFERENCES environment (id),
    argv TEXT NOT NULL,
    sampler TEXT NOT NULL,
    seed INTEGER NOT NULL,
    budget_seconds REAL NOT NULL,
    created_at TEXT NOT NULL
) STRICT;

CREATE TABLE tuning_end (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    tuning INTEGER NOT NULL UNIQUE REFERENCES tuning (id),
    spent_seconds REAL NOT NULL,
    stop TEXT NOT NULL CHECK (stop IN ('budget', 'converged', 'space', 'interrupted', 'failed')),
    created_at TEXT NOT NULL
) STRICT;

-- One candidate, timed in turn with the default: sample i and default sample i are a pair, in
-- seconds. `parameters` are all that the task's code takes beside its signature; failures are kept
-- too, so that none is tried twice.
CREATE TABLE trial (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    tuning INTEGER NOT NULL REFERENCES tuning (id),
    number INTEGER NOT NULL,
    task INTEGER NOT NULL REFERENCES task (id),
    environment INTEGER NOT NULL REFERENCES environment (id),
    workload INTEGER NOT NULL REFERENCES workload (id),
    protocol INTEGER NOT NULL REFERENCES protocol (id),
    parameters TEXT NOT NULL,
    parameters_digest TEXT NOT NULL,
    knobs TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN (
        'ok', 'invalid', 'compile_error', 'timeout', 'out_of_memory', 'wrong_result', 'throttled'
    )),
    samples TEXT NOT NULL,
    default_samples TEXT NOT NULL,
    predicted_seconds REAL,
    max_error REAL,
    note TEXT NOT NULL,
    created_at TEXT NOT NULL,
    UNIQUE (tuning, number)
) STRICT;

CREATE INDEX trial_by_task ON trial (task, environment, workload, protocol);

-- By how much measured seconds of a class of work exceed predicted ones, and what says so.
CREATE TABLE correction (
    id INTEGER PRIMARY KEY,
    uid TEXT NOT NULL UNIQUE,
    environment INTEGER NOT NULL REFERENCES environment (id),
    factors TEXT NOT NULL,
    evidence TEXT NOT NULL,
    created_at TEXT NOT NULL
) STRICT;

-- version 3

-- The task graph that a correction was found on: what small operators take beside large ones
-- differs from model to model.
ALTER TABLE correction ADD COLUMN graph TEXT NOT NULL DEFAULT '';
