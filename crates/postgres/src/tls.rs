//! TLS as libpq's `sslmode` means it, on rustls with ring.
//!
//! | sslmode | encrypted | chain checked | name checked |
//! | --- | --- | --- | --- |
//! | `require` | yes | no | no |
//! | `verify-ca` | yes | yes | no |
//! | `verify-full` | yes | yes | yes |
//!
//! Two differences from libpq: a name is looked for in the certificate's subject alternative names only, never in
//! its common name; and a server certificate that is itself in the root file is trusted as it is, its dates unread.
//!
//! The same connector serves the replication connection and tokio-postgres, and both get the channel binding
//! `tls-server-end-point` (RFC 5929), so that SCRAM proves that nobody stands in between.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use ring::digest;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect};
use tokio_rustls::TlsConnector;

use crate::config::{ConfigError, RootCert, Ssl, SslMode};

/// Makes TLS connections as one [`Ssl`] says.
#[derive(Clone)]
pub struct Tls {
    config: Arc<ClientConfig>,
}

impl Tls {
    /// Reads the certificates and keys that `ssl` names.
    pub fn new(ssl: &Ssl) -> Result<Self, ConfigError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = Arc::new(Verifier::new(ssl, provider.clone())?);
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| ConfigError::Tls(error.to_string()))?
            .dangerous()
            .with_custom_certificate_verifier(verifier);
        let mut config = match &ssl.client {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let unusable = |file: &std::path::Path, error: &dyn std::fmt::Display| {
                    ConfigError::Tls(format!("client certificate {}: {error}", file.display()))
                };
                let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, &error))?;
                let chain = pem_certificates(certificate)?;
                builder.with_client_auth_cert(chain, key).map_err(|error| unusable(certificate, &error))?
            }
        };
        // Servers from version 17 demand it when TLS begins without asking.
        config.alpn_protocols = vec![b"postgresql".to_vec()];
        Ok(Tls { config: Arc::new(config) })
    }

    /// Does the handshake.
    pub(crate) async fn handshake<S>(&self, host: &str, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let name = ServerName::try_from(host.to_owned()).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, format!("`{host}` is not a host name"))
        })?;
        TlsConnector::from(self.config.clone()).connect(name, stream).await.map(TlsStream)
    }
}

fn pem_certificates(file: &std::path::Path) -> Result<Vec<CertificateDer<'static>>, ConfigError> {
    let unusable = |error: &dyn std::fmt::Display| ConfigError::Tls(format!("{}: {error}", file.display()));
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(file).and_then(Iterator::collect).map_err(|error| unusable(&error))?;
    if certificates.is_empty() {
        return Err(unusable(&"holds no certificate"));
    }
    Ok(certificates)
}

/// A TLS connection that knows its channel binding.
pub struct TlsStream<S>(tokio_rustls::client::TlsStream<S>);

impl<S> TlsStream<S> {
    /// Digest of the server's certificate (RFC 5929, section 4.1); `None` where the signature's own algorithm does
    /// not say which digest to use.
    pub(crate) fn server_end_point(&self) -> Option<Vec<u8>> {
        let certificate = self.0.get_ref().1.peer_certificates()?.first()?;
        let algorithm = end_point_digest(signature_algorithm(certificate)?)?;
        Some(digest::digest(algorithm, certificate).as_ref().to_vec())
    }
}

/// RFC 5929: the digest of the certificate's signature, SHA-256 in place of MD5 and SHA-1.
fn end_point_digest(oid: &[u8]) -> Option<&'static digest::Algorithm> {
    const RSA: &[u8] = b"\x2a\x86\x48\x86\xf7\x0d\x01\x01";
    const ECDSA: &[u8] = b"\x2a\x86\x48\xce\x3d\x04";
    match (oid.strip_prefix(RSA), oid.strip_prefix(ECDSA)) {
        (Some([4 | 5 | 11]), _) | (_, Some([1] | [3, 2])) => Some(&digest::SHA256),
        (Some([12]), _) | (_, Some([3, 3])) => Some(&digest::SHA384),
        (Some([13]), _) | (_, Some([3, 4])) => Some(&digest::SHA512),
        _ => None,
    }
}

/// The object id in `Certificate.signatureAlgorithm.algorithm` (RFC 5280, section 4.1), as DER has it.
fn signature_algorithm(certificate: &[u8]) -> Option<&[u8]> {
    let (certificate, _) = der_content(certificate)?;
    let (_, after_tbs) = der_content(certificate)?;
    let (algorithm, _) = der_content(after_tbs)?;
    der_content(algorithm).map(|(oid, _)| oid)
}

/// Content of the first DER element, and what follows the element.
fn der_content(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (_tag, rest) = bytes.split_first()?;
    let (first, rest) = rest.split_first()?;
    if *first < 0x80 {
        return rest.split_at_checked(usize::from(*first));
    }
    let (length, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
    if length.len() > 4 {
        return None;
    }
    let length = length.iter().fold(0_usize, |length, byte| length << 8 | usize::from(*byte));
    rest.split_at_checked(length)
}

/// Checks a server's certificate as far as `sslmode` asks.
#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    /// `None` trusts everybody.
    authorities: Option<Arc<WebPkiServerVerifier>>,
    /// Certificates of the root file, trusted also as a server's own.
    pinned: Vec<CertificateDer<'static>>,
    check_name: bool,
}

impl Verifier {
    fn new(ssl: &Ssl, provider: Arc<CryptoProvider>) -> Result<Self, ConfigError> {
        let mut verifier = Verifier {
            provider: provider.clone(),
            authorities: None,
            pinned: Vec::new(),
            check_name: ssl.mode == SslMode::VerifyFull,
        };
        if ssl.mode < SslMode::VerifyCa {
            return Ok(verifier);
        }
        let mut store = RootCertStore::empty();
        match &ssl.root {
            RootCert::None => {
                return Err(ConfigError::Tls(
                    "sslmode verify-ca and verify-full need sslrootcert: a PEM file, or `system`".into(),
                ));
            }
            RootCert::System => {
                store.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
            RootCert::File(file) => {
                verifier.pinned = pem_certificates(file)?;
                store.add_parsable_certificates(verifier.pinned.iter().cloned());
            }
        }
        let authorities = WebPkiServerVerifier::builder_with_provider(store.into(), provider).build();
        verifier.authorities = Some(authorities.map_err(|error| ConfigError::Tls(error.to_string()))?);
        Ok(verifier)
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(authorities) = &self.authorities else { return Ok(ServerCertVerified::assertion()) };
        if self.pinned.contains(certificate) {
            if self.check_name {
                rustls::client::verify_server_name(&ParsedCertificate::try_from(certificate)?, name)?;
            }
            return Ok(ServerCertVerified::assertion());
        }
        // The chain is checked before the name, so a wrong name means a good chain.
        match authorities.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !self.check_name => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl<S> MakeTlsConnect<S> for Tls
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = TlsStream<S>;
    type TlsConnect = Connector;
    type Error = io::Error;

    fn make_tls_connect(&mut self, domain: &str) -> io::Result<Connector> {
        Ok(Connector { tls: self.clone(), host: domain.to_owned() })
    }
}

/// A [`Tls`] for one host, as tokio-postgres wants it.
pub struct Connector {
    tls: Tls,
    host: String,
}

impl<S> TlsConnect<S> for Connector
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    type Stream = TlsStream<S>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<TlsStream<S>>> + Send>>;

    fn connect(self, stream: S) -> Self::Future {
        Box::pin(async move { self.tls.handshake(&self.host, stream).await })
    }
}

impl<S> tokio_postgres::tls::TlsStream for TlsStream<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    fn channel_binding(&self) -> ChannelBinding {
        self.server_end_point().map_or_else(ChannelBinding::none, ChannelBinding::tls_server_end_point)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
    }
}
