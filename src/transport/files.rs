//! PEM files of keys and certificates: written whole or not at all, keys for their owner only.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use rustls_pki_types::{CertificateDer, PrivatePkcs8KeyDer, pem::PemObject};

use super::TransportError;

/// Writes a file of mode 0600 that a reader sees either whole or not at all.
pub(super) fn write_private(path: &Path, contents: &str) -> Result<(), TransportError> {
    let temporary = path.with_extension(format!("tmp-{}", std::process::id()));
    let written = write_new(&temporary, contents).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // Best effort: the error that matters is the one being returned.
        let _ = fs::remove_file(&temporary);
    }
    written.map_err(|source| TransportError::File { path: path.into(), source })
}

fn write_new(path: &Path, contents: &str) -> io::Result<()> {
    // One left by a killed process that had our id would keep its own mode.
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(contents.as_bytes())?;
    file.sync_all()
}

/// Makes the entries of a directory survive a crash.
pub(super) fn sync_directory(path: &Path) -> Result<(), TransportError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(|source| TransportError::File { path: path.into(), source })
}

/// The one certificate of a PEM file.
pub(super) fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, TransportError> {
    CertificateDer::from_pem_slice(&read(path)?)
        .map_err(|e| damaged(path, format!("no certificate in it ({e})")))
}

/// The one private key of a PEM file.
pub(super) fn read_key(path: &Path) -> Result<PrivatePkcs8KeyDer<'static>, TransportError> {
    PrivatePkcs8KeyDer::from_pem_slice(&read(path)?)
        .map_err(|e| damaged(path, format!("no private key in it ({e})")))
}

/// The certificates of a PEM file, at least one.
pub(super) fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TransportError> {
    let all = CertificateDer::pem_slice_iter(&read(path)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| damaged(path, format!("no certificate in it ({e})")))?;
    if all.is_empty() { Err(damaged(path, "no certificate in it")) } else { Ok(all) }
}

/// Certificates one behind the other.
pub(super) fn pem_certificates(certificates: &[CertificateDer<'_>]) -> String {
    certificates.iter().map(|certificate| pem("CERTIFICATE", certificate)).collect()
}

/// RFC 7468: base64 in lines of 64 characters between two markers.
pub(super) fn pem(label: &str, der: &[u8]) -> String {
    use base64::{Engine, engine::general_purpose::STANDARD};
    let body = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII: every index is a boundary.
        let (line, tail) = rest.split_at(rest.len().min(64));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, TransportError> {
    fs::read(path).map_err(|source| TransportError::File { path: path.into(), source })
}

pub(super) fn damaged(path: &Path, problem: impl Into<String>) -> TransportError {
    TransportError::Damaged { path: path.into(), problem: problem.into() }
}
