// What a user of E2B's JavaScript client does, for any version of it: prints one line per feature.
//
// Run by Node: `scenario.mjs PACKAGE_DIR TEMPLATE`. A line is JSON: `feature`, and `outcome`:
// `works`, `absent` where this version has no such feature, or what failed.

import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import dns from 'node:dns'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

const [directory, template, existing] = process.argv.slice(2)
const { Sandbox, CommandExitError, TimeoutError } = createRequire(`${directory}/x.js`)('e2b')
const patience = Number(process.env.SCENARIO_PATIENCE) * 1000
const root = { user: 'root' }

// Names below localhost are this machine, as in browsers; not every C library knows.
const lookup = dns.lookup
dns.lookup = (name, ...rest) =>
  lookup(name.endsWith('.localhost') ? '127.0.0.1' : name, ...rest)

class Absent extends Error {}

function have(thing, ...names) {
  const name = names.find((each) => typeof thing[each] === 'function')
  if (name === undefined) throw new Absent()
  return thing[name].bind(thing)
}

async function all(listed) {
  if (!listed.nextItems) return await listed
  const found = []
  while (listed.hasNext) found.push(...(await listed.nextItems()))
  return found
}

async function caught(call) {
  try {
    await call()
  } catch (error) {
    return error
  }
  assert.fail('no error')
}

if (existing) {
  const other = await Sandbox.connect(existing)
  process.stdout.write((await other.commands.run('echo from another process', root)).stdout)
  process.exit()
}

const sandbox = await Sandbox.create(template, {
  timeoutMs: 300_000,
  metadata: { m: '1' },
  envs: { A: '1' },
})
const id = sandbox.sandboxId
const home = `scenario-${id}`

const features = {
  create: async () => {},
  info: async () => {
    const told = await have(Sandbox, 'getInfo')(id)
    assert.equal(told.sandboxId, id)
    assert.equal(told.metadata.m, '1')
  },
  'list with filters': async () => {
    const metadata = { scenario: 'b c&\u00fc', version: id }
    const other = await Sandbox.create(template, { metadata, timeoutMs: 120_000 })
    const found = await all(Sandbox.list({ query: { metadata } }))
    assert.deepEqual(found.map((each) => each.sandboxId), [other.sandboxId])
    await other.kill()
  },
  'set a timeout': async () => {
    await sandbox.setTimeout(500_000)
    const told = await have(Sandbox, 'getInfo')(id)
    assert.ok(told.endAt - told.startedAt > 450_000)
  },
  'is it running': async () => assert.ok(await sandbox.isRunning()),
  'run a command': async () => {
    const result = await sandbox.commands.run('echo out; echo err >&2', root)
    assert.equal(result.stdout, 'out\n')
    assert.equal(result.stderr, 'err\n')
  },
  environment: async () => {
    const result = await sandbox.commands.run('echo "$A $B"', { envs: { B: '2' }, ...root })
    assert.equal(result.stdout, '1 2\n')
  },
  'exit code': async () => {
    const error = await caught(() => sandbox.commands.run('exit 3', root))
    assert.ok(error instanceof CommandExitError)
    assert.equal(error.exitCode, 3)
  },
  'time limit of a command': async () => {
    const error = await caught(() => sandbox.commands.run('sleep 60', { timeoutMs: 1000, ...root }))
    assert.ok(error instanceof TimeoutError, String(error))
  },
  'command in the background': async () => {
    const command = await sandbox.commands.run('sleep 600', { background: true, ...root })
    assert.ok((await sandbox.commands.list()).some((each) => each.pid === command.pid))
    assert.equal(await sandbox.commands.kill(command.pid), true)
    assert.equal(await sandbox.commands.kill(command.pid), false)
  },
  input: async () => {
    const options = { background: true, stdin: true, ...root }
    const command = await sandbox.commands.run('head -n 1', options)
    await sandbox.commands.sendStdin(command.pid, 'line\n')
    assert.equal((await command.wait()).stdout, 'line\n')
  },
  files: async () => {
    const path = `${home}/a directory/\u00fc.txt`
    await sandbox.files.write(path, 'text', root)
    assert.equal(await sandbox.files.read(path, root), 'text')
    const names = (await sandbox.files.list(`${home}/a directory`, root)).map((each) => each.name)
    assert.deepEqual(names, ['\u00fc.txt'])
    await sandbox.files.rename(path, `${home}/b`, root)
    assert.equal(await sandbox.files.exists(path, root), false)
    await sandbox.files.remove(`${home}/b`, root)
  },
  watch: async () => {
    let handle
    const seen = new Promise((resolve, reject) => {
      setTimeout(() => reject(new Error('no event')), patience).unref()
      handle = sandbox.files.watchDir(home, (event) => event.name === 'watched' && resolve(), root)
    })
    await handle
    await sandbox.files.write(`${home}/watched`, 'x', root)
    await seen
    await (await handle).stop()
  },
  terminal: async () => {
    let said = ''
    const onData = (data) => (said += Buffer.from(data).toString())
    const pty = await sandbox.pty.create({ cols: 80, rows: 24, onData, ...root })
    await sandbox.pty.sendInput(pty.pid, Buffer.from('echo $((6 * 7)); exit\n'))
    await pty.wait()
    assert.ok(said.includes('42\r\n'), said)
  },
  'connect from another process': async () => {
    const file = fileURLToPath(import.meta.url)
    const said = await promisify(execFile)(process.execPath, [file, directory, template, id])
    assert.equal(said.stdout, 'from another process\n')
  },
  'pause and connect': async () => {
    await sandbox.files.write(`${home}/kept`, 'kept', root)
    assert.equal(await have(sandbox, 'pause', 'betaPause')(), true)
    assert.equal(await sandbox.isRunning(), false)
    const again = await Sandbox.connect(id, { timeoutMs: 300_000 })
    assert.equal(await again.files.read(`${home}/kept`, root), 'kept')
  },
  snapshot: async () => {
    const made = await have(sandbox, 'createSnapshot')()
    const other = await Sandbox.create(made.snapshotId, { timeoutMs: 120_000 })
    assert.equal(await other.kill(), true)
    assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), true)
    assert.equal(await Sandbox.deleteSnapshot(made.snapshotId), false)
  },
  fork: async () => {
    for (const each of await have(sandbox, 'fork')({ count: 2 })) assert.equal(await each.kill(), true)
  },
  'network rules': async () => {
    const update = have(sandbox, 'updateNetwork')
    await update({ allowOut: ['203.0.113.9', 'example.com'], denyOut: ['0.0.0.0/0'] })
    await caught(() => update({ allowOut: ['example'] }))
  },
  metrics: async () => assert.ok(Array.isArray(await have(sandbox, 'getMetrics')())),
  errors: async () => {
    await caught(() => sandbox.files.read(`${home}/missing`, root))
    await caught(() => Sandbox.create('no-such-template'))
    assert.equal(await Sandbox.kill('sb-aaaaaaaaaaaaaaaaaaaa'), false)
  },
  kill: async () => {
    assert.notEqual(await Sandbox.kill(id), false)
    assert.equal(await Sandbox.kill(id), false)
    await caught(() => sandbox.commands.run('true', root))
    assert.equal(await sandbox.isRunning(), false)
  },
}

for (const [feature, work] of Object.entries(features)) {
  let outcome = 'works'
  try {
    await work()
  } catch (error) {
    outcome = error instanceof Absent ? 'absent' : String(error.stack)
  }
  console.log(JSON.stringify({ feature, outcome }))
}
process.exit()
