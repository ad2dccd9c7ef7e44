//! The server's side of HTTPS: a certificate that clients of other makes trust, given as files. It has
//! nothing to do with the cluster's CA, which only Lockstep's own processes know.

use std::path::Path;

use rustls_pki_types::{
    CertificateDer, PrivateKeyDer,
    pem::{self, PemObject},
};

use super::{TransportError, tls};

/// A certificate chain with its private key, ready to serve.
#[derive(Debug, Clone)]
pub struct HttpsIdentity {
    config: rustls::ServerConfig,
}

impl HttpsIdentity {
    /// Reads PEM files: the server's certificate with those that vouch for it behind it, and the private key
    /// (PKCS#8, PKCS#1 or SEC1). Refused, with the file's name: what can't be read, or is not that.
    pub fn read(certificate: &Path, key: &Path) -> Result<Self, TransportError> {
        let chain: Vec<CertificateDer> = CertificateDer::pem_file_iter(certificate)
            .and_then(|certificates| certificates.collect())
            .map_err(|error| unreadable(certificate, "certificate", error))?;
        if chain.is_empty() {
            return Err(damaged(certificate, "it holds no certificate in PEM form"));
        }
        let private = PrivateKeyDer::from_pem_file(key).map_err(|e| unreadable(key, "private key", e))?;
        let config = rustls::ServerConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()
            .map_err(tls::tls_error)?
            .with_no_client_auth()
            .with_single_cert(chain, private);
        match config {
            Ok(config) => Ok(Self { config }),
            Err(rustls::Error::InconsistentKeys(_)) => {
                Err(damaged(key, &format!("it is not the key of the certificate {}", certificate.display())))
            }
            Err(error @ rustls::Error::InvalidCertificate(_)) => {
                Err(damaged(certificate, &error.to_string()))
            }
            Err(error) => Err(damaged(key, &error.to_string())),
        }
    }

    /// As servers take it.
    pub fn into_config(self) -> rustls::ServerConfig {
        self.config
    }
}

fn unreadable(path: &Path, what: &str, error: pem::Error) -> TransportError {
    match error {
        pem::Error::Io(source) => TransportError::File { path: path.to_owned(), source },
        pem::Error::NoItemsFound => damaged(path, &format!("it holds no {what} in PEM form")),
        error => damaged(path, &error.to_string()),
    }
}

fn damaged(path: &Path, problem: &str) -> TransportError {
    TransportError::Damaged { path: path.to_owned(), problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use super::*;

    fn written(directory: &Path, name: &str) -> (PathBuf, PathBuf) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        let (certificate, key) =
            (directory.join(format!("{name}.crt")), directory.join(format!("{name}.key")));
        fs::write(&certificate, made.cert.pem()).unwrap();
        fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        (certificate, key)
    }

    fn refused(certificate: &Path, key: &Path) -> String {
        HttpsIdentity::read(certificate, key).unwrap_err().to_string()
    }

    #[test]
    fn a_certificate_and_its_key_serve() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = written(directory.path(), "a");
        HttpsIdentity::read(&certificate, &key).unwrap();
    }

    #[test]
    fn each_wrong_file_is_named_with_what_is_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = written(directory.path(), "a");
        let (_, other) = written(directory.path(), "b");
        let empty = directory.path().join("empty.pem");
        fs::write(&empty, "nothing\n").unwrap();
        let absent = directory.path().join("absent.pem");
        assert!(refused(&empty, &key).contains("empty.pem is damaged: it holds no certificate"));
        assert!(refused(&certificate, &empty).contains("empty.pem is damaged: it holds no private key"));
        assert!(refused(&absent, &key).contains("absent.pem: No such file"));
        let mismatch = refused(&certificate, &other);
        assert!(
            mismatch.contains("b.key") && mismatch.contains("not the key of the certificate"),
            "{mismatch}"
        );
    }
}
