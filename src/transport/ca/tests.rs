use std::os::unix::fs::PermissionsExt;

use super::*;

#[test]
fn the_ca_is_made_once_and_is_private() {
    let directory = tempfile::tempdir().unwrap();
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    let second = ClusterCa::open_or_create(directory.path()).unwrap();
    assert_eq!(first.fingerprint(), second.fingerprint());
    assert_eq!(first.fingerprint().len(), 64);
    for file in ["ca", "ca/ca.key", "ca/ca.crt"] {
        let mode = fs::metadata(directory.path().join(file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{file} has mode {mode:o}");
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "no temporary is left");
    // What the reopened CA issues is trusted by the certificate of the first.
    second.issue(Role::Node, "a").unwrap();
}

#[test]
fn starts_at_the_same_time_agree_on_one_ca() {
    let directory = tempfile::tempdir().unwrap();
    let home = directory.path().join("ca");
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    // A second process found no CA, and loses the race for the rename.
    create(directory.path(), &home).unwrap();
    assert_eq!(open(&home).unwrap().fingerprint(), first.fingerprint());
}

#[test]
fn a_damaged_or_missing_file_is_named() {
    for (file, contents) in [("ca.key", Some("nonsense")), ("ca.crt", Some("nonsense")), ("ca.key", None)] {
        let directory = tempfile::tempdir().unwrap();
        ClusterCa::open_or_create(directory.path()).unwrap();
        let path = directory.path().join("ca").join(file);
        match contents {
            Some(contents) => fs::write(&path, contents).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let error = ClusterCa::open_or_create(directory.path()).err().unwrap();
        assert!(error.to_string().contains(file), "{error}");
        assert!(!error.is_retryable());
    }
}

#[test]
fn the_key_of_another_ca_is_noticed() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for directory in [&a, &b] {
        ClusterCa::open_or_create(directory.path()).unwrap();
    }
    fs::copy(b.path().join("ca/ca.key"), a.path().join("ca/ca.key")).unwrap();
    let error = ClusterCa::open_or_create(a.path()).err().unwrap();
    assert!(matches!(error, TransportError::Damaged { .. }), "{error}");
}

#[test]
fn a_change_of_the_ca_keeps_the_cluster_and_forgets_the_former_key() {
    let directory = tempfile::tempdir().unwrap();
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    let before = first.issue(Role::Node, "a").unwrap();
    let second = ClusterCa::rotate(directory.path()).unwrap();
    assert!(second.is_rotating() && second.fingerprint() != first.fingerprint());
    assert!(ClusterCa::rotate(directory.path()).is_err(), "one after the other");
    let reopened = ClusterCa::open_or_create(directory.path()).unwrap();
    assert_eq!(reopened.certificates(), second.certificates());
    assert_eq!(reopened.certificates()[1], first.certificates()[0]);
    let after = reopened.issue(Role::Node, "a").unwrap();
    assert_eq!(after.cluster(), before.cluster());
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1, "nothing of the former CA is left");

    let finished = ClusterCa::finish(directory.path()).unwrap();
    assert_eq!(finished.certificates(), second.certificates()[..1]);
    assert_eq!(finished.issue(Role::Node, "b").unwrap().cluster(), before.cluster());
    let third = ClusterCa::rotate(directory.path()).unwrap();
    assert_eq!(third.issue(Role::Node, "c").unwrap().cluster(), before.cluster(), "and so on");
}

#[test]
fn a_change_that_ended_between_its_renames_is_undone() {
    let directory = tempfile::tempdir().unwrap();
    let first = ClusterCa::open_or_create(directory.path()).unwrap();
    fs::rename(directory.path().join("ca"), directory.path().join(PUT_ASIDE)).unwrap();
    assert_eq!(ClusterCa::open_or_create(directory.path()).unwrap().fingerprint(), first.fingerprint());
    ClusterCa::rotate(directory.path()).unwrap();
}
