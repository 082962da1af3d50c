//! The client's part of SCRAM (RFC 5802, RFC 7677), without channel binding, which Kafka does not have. That of
//! `postgres-protocol` leaves out the user's name, and SHA-512.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use openssl::hash::{MessageDigest, hash};
use openssl::memcmp;
use openssl::pkcs5::pbkdf2_hmac;
use openssl::pkey::PKey;
use openssl::sign::Signer;

/// Fewer would make the password guessable for whoever listens; Kafka's brokers refuse to store fewer.
const ITERATIONS_MIN: usize = 4_096;
/// More would have a false broker keep us busy.
const ITERATIONS_MAX: usize = 10_000_000;

/// One login.
pub(super) struct Scram<'a> {
    digest: MessageDigest,
    password: &'a str,
    nonce: String,
    first_bare: String,
}

/// What proves to us that the broker knows the password, too.
pub(super) struct ServerProof(Vec<u8>);

impl<'a> Scram<'a> {
    pub(super) fn new(digest: MessageDigest, user: &str, password: &'a str, nonce: String) -> Self {
        let user = user.replace('=', "=3D").replace(',', "=2C");
        let first_bare = format!("n={user},r={nonce}");
        Scram { digest, password, nonce, first_bare }
    }

    pub(super) fn first(&self) -> String {
        format!("n,,{}", self.first_bare)
    }

    /// The answer to the broker's first message.
    pub(super) fn last(&self, server_first: &str) -> Result<(String, ServerProof), String> {
        let unclear = || "the broker's SCRAM message cannot be understood".to_owned();
        let field = |name: &str| server_first.split(',').find_map(|part| part.strip_prefix(name));
        let nonce = field("r=").ok_or_else(unclear)?;
        let salt = BASE64.decode(field("s=").ok_or_else(unclear)?).map_err(|_| unclear())?;
        let iterations: usize = field("i=").and_then(|number| number.parse().ok()).ok_or_else(unclear)?;
        if !nonce.starts_with(&self.nonce) || nonce.len() == self.nonce.len() {
            return Err("the broker's SCRAM message belongs to another login".to_owned());
        }
        if !(ITERATIONS_MIN..=ITERATIONS_MAX).contains(&iterations) {
            return Err(format!("the broker asks for {iterations} SCRAM iterations"));
        }
        let failed = |error: openssl::error::ErrorStack| error.to_string();
        let mut salted = vec![0; self.digest.size()];
        pbkdf2_hmac(self.password.as_bytes(), &salt, iterations, self.digest, &mut salted).map_err(failed)?;
        let without_proof = format!("c=biws,r={nonce}");
        let signed = format!("{},{server_first},{without_proof}", self.first_bare);
        let client_key = self.hmac(&salted, b"Client Key")?;
        let stored_key = hash(self.digest, &client_key).map_err(failed)?;
        let signature = self.hmac(&stored_key, signed.as_bytes())?;
        let proof: Vec<u8> = client_key.iter().zip(&signature).map(|(key, sign)| key ^ sign).collect();
        let server_key = self.hmac(&salted, b"Server Key")?;
        let server = self.hmac(&server_key, signed.as_bytes())?;
        Ok((format!("{without_proof},p={}", BASE64.encode(proof)), ServerProof(server)))
    }

    fn hmac(&self, key: &[u8], message: &[u8]) -> Result<Vec<u8>, String> {
        let sign = || {
            let key = PKey::hmac(key)?;
            Signer::new(self.digest, &key)?.sign_oneshot_to_vec(message)
        };
        sign().map_err(|error: openssl::error::ErrorStack| error.to_string())
    }
}

impl ServerProof {
    pub(super) fn check(&self, server_last: &str) -> Result<(), String> {
        let proof = server_last.split(',').find_map(|part| part.strip_prefix("v="));
        let proof = proof.and_then(|proof| BASE64.decode(proof).ok()).unwrap_or_default();
        if proof.len() == self.0.len() && memcmp::eq(&proof, &self.0) {
            return Ok(());
        }
        Err("the broker does not know the password: it is not the one it says".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The exchange that RFC 7677 gives.
    #[test]
    fn the_standards_example() {
        let scram = Scram::new(MessageDigest::sha256(), "user", "pencil", "rOprNGfwEbeRWgbNEkqO".to_owned());
        assert_eq!(scram.first(), "n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let server_first =
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096";
        let (last, proof) = scram.last(server_first).unwrap();
        assert_eq!(
            last,
            "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="
        );
        proof.check("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=").unwrap();
        assert!(proof.check("v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G5=").is_err());
        assert!(proof.check("e=invalid-proof").is_err());
        assert!(scram.last(&server_first.replace("r=rOpr", "r=rOps")).is_err());
        assert!(scram.last(&server_first.replace("i=4096", "i=1")).is_err());
    }
}
