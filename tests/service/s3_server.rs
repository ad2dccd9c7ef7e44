//! A real S3 server over a directory: signatures are checked, presigned URLs are served.

use std::{
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};

pub const BUCKET: &str = "team-models";
pub const KEY_ID: &str = "AKIATEST";
pub const SECRET: &str = "not-a-secret";

/// Serves until it is dropped.
pub struct S3Server {
    pub address: SocketAddr,
    directory: PathBuf,
    runtime: Option<tokio::runtime::Runtime>,
}

impl S3Server {
    /// A server of `directory` with one empty bucket.
    pub fn start(directory: &Path) -> Self {
        std::fs::create_dir_all(directory.join(BUCKET)).expect("a bucket");
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.set_nonblocking(true).expect("a socket");
        let address = listener.local_addr().expect("bound");
        let mut builder = S3ServiceBuilder::new(s3s_fs::FileSystem::new(directory).expect("a directory"));
        builder.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let service = builder.build();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
            while let Ok((socket, _)) = listener.accept().await {
                let service = service.clone();
                tokio::spawn(async move {
                    let server = Builder::new(TokioExecutor::new());
                    // A client that hangs up is no news.
                    let _ = server.serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        Self { address, directory: directory.to_owned(), runtime: Some(runtime) }
    }

    /// What a process that uses the server has in its environment.
    pub fn environment(&self) -> [(String, String); 4] {
        [
            ("AWS_ENDPOINT_URL".into(), format!("http://{}", self.address)),
            ("AWS_REGION".into(), "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID".into(), KEY_ID.into()),
            ("AWS_SECRET_ACCESS_KEY".into(), SECRET.into()),
        ]
    }

    /// Where an object lies on the server's disk.
    pub fn object(&self, key: &str) -> PathBuf {
        self.directory.join(BUCKET).join(key)
    }
}

impl Drop for S3Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // Tests that are async may not wait for it.
            runtime.shutdown_background();
        }
    }
}
