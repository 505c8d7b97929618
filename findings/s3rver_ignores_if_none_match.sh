#!/usr/bin/env bash
# s3rver 3.7.1 (npm), a stand-in for Amazon S3.
# One would expect a second PUT with "If-None-Match: *" to be answered 412, and the first bytes to stay, as S3 does it.
# s3rver answers 200 to both and keeps the second bytes.
# It hurts whoever relies on "create only if absent" to keep two writers apart: the first one's object is lost silently.
# Our product creates one key twice before its first write, and refuses a store in which the second creation wins.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm install --prefix . --silent --no-audit --no-fund s3rver@3.7.1

cat >twice.mjs <<'EOF'
import S3rver from 's3rver'

const options = { address: '127.0.0.1', port: 0, silent: true, directory: 'data', configureBuckets: [{ name: 'bucket' }] }
const server = new S3rver(options)
const { port } = await server.run()
const object = `http://127.0.0.1:${port}/bucket/key`
const answers = []
for (const body of ['first', 'second']) {
  const answer = await fetch(object, { method: 'PUT', headers: { 'If-None-Match': '*' }, body })
  answers.push(answer.status)
}
const kept = await (await fetch(object)).text()
await server.close()
console.log(`the two creations are answered ${answers.join(' and ')}; the object holds "${kept}"`)
if (answers.join() !== '200,200' || kept !== 'second') {
  console.error('Changed: s3rver no longer lets the second creation win.')
  process.exit(1)
}
EOF
timeout 60 node twice.mjs
